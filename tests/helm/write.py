"""What is written from other files, and held against them by the tests: look at the difference before you commit it.

    python -m tests.helm.write

- golden files: the chart, rendered for each case of ``tests.helm.cases``;
- the part of values.schema.json that is the application's settings, from ``serve_app.settings``;
- the table in the chart's README.md, from values.yaml.
"""

from __future__ import annotations

import json
from typing import Any

from serve_app.settings import Settings
from tests.helm.cases import CASES
from tests.helm.documented import table
from tests.helm.rendering import CHART, GOLDEN, manifest, render

SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->\n"


def with_settings(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the settings' own definitions (their names begin with a capital letter)."""
    settings = Settings.model_json_schema()
    definitions = {**settings.pop("$defs"), "Settings": settings}
    for definition in definitions.values():
        # what is set from other values is refused with a word on it (templates/_check.tpl), so it must pass here
        for part in (definition, *definition["properties"].values()):
            for words in ("title", "description", "default"):  # Helm says none of them, and here they would stand twice
                part.pop(words, None)
    kept = {name: value for name, value in schema["$defs"].items() if not name[0].isupper()}
    return {**schema, "$defs": {**kept, **dict(sorted(definitions.items()))}}


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    schema = with_settings(json.loads(SCHEMA.read_text()))
    SCHEMA.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")
    README.write_text(with_table(README.read_text()))
    GOLDEN.mkdir(exist_ok=True)
    for file in GOLDEN.glob("*.yaml"):
        if file.stem not in CASES:
            file.unlink()
    for name, values in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(manifest(render(values)))


if __name__ == "__main__":
    main()
