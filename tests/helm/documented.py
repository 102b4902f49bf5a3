"""The keys of values.yaml with their comments and defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.helm.rendering import CHART, values_of

KEY = re.compile(r"( *)([A-Za-z]\w*):(?: (.*))?$")


@dataclass(frozen=True)
class Key:
    path: str
    comment: str
    value: Any
    """Its default; a map where others are below it."""
    above: bool
    """Has it keys below it, each with a line of its own?"""


def keys() -> list[Key]:
    """Every key that has a line of its own."""
    return list(_keys((CHART / "values.yaml").read_text().splitlines()))


def _keys(lines: list[str]) -> Iterator[Key]:
    values = values_of("values.yaml")
    path: list[str] = []
    for number, line in enumerate(lines):
        if (match := KEY.match(line)) is None:
            assert not line or line.lstrip().startswith("#"), f"neither a key nor a comment: {line}"
            continue
        indent, name, rest = match.groups()
        assert len(indent) % 2 == 0
        path = [*path[: len(indent) // 2], name]
        comment: list[str] = []
        for before in reversed(lines[:number]):
            if not before.startswith(f"{indent}# "):
                break
            comment.insert(0, before.removeprefix(f"{indent}# "))
        value: Any = values
        for each in path:
            value = value[each]
        if rest:
            assert yaml.safe_load(rest) == value
        yield Key(".".join(path), " ".join(comment), value, above=rest is None)


def table() -> str:
    """For the README."""
    rows = ["| value | default | |\n", "| --- | --- | --- |\n"]
    for key in keys():
        default = "" if key.above else f"`{json.dumps(key.value, ensure_ascii=False)}`"
        rows.append(f"| `{key.path}` | {default} | {key.comment.replace('|', chr(92) + '|')} |\n")
    return "".join(rows)
