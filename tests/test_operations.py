"""docs/operations.md: its links lead somewhere, its names exist, its computed figures follow from its measured ones."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from serve_app.settings import Settings
from tests.conftest import ROOT

DOCS = ROOT / "docs"
TEXT = (DOCS / "operations.md").read_text()
VALUES = yaml.safe_load((ROOT / "helm" / "whisper-serve" / "values.yaml").read_text())


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_links_lead_somewhere(link: str) -> None:
    path, _, anchor = link.partition("#")
    page = (DOCS / path).resolve() if path else DOCS / "operations.md"
    assert page.exists()
    if anchor:
        assert anchor in anchors(page.read_text())


def in_values(name: str) -> bool:
    """``groups.*.replicas``: in all of them."""
    found: list[Any] = [VALUES]
    for part in name.split("."):
        if part == "*":
            found = [value for each in found for value in each.values()]
        elif not all(isinstance(each, dict) and part in each for each in found):
            return False
        else:
            found = [each[part] for each in found]
    return True


def in_settings(name: str) -> bool:
    model: Any = Settings
    for part in name.split("."):
        if part == "*":
            return True
        if not (isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields):
            return False
        model = model.model_fields[part].annotation
    return True


def test_values_and_settings_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:[a-z]\w*)(?:\.(?:\*|\w+))+)[:`]", TEXT))
    named = {name for name in named if name.partition(".")[0] in set(VALUES) | set(Settings.model_fields)}
    assert len(named) > 20
    missing = {
        name
        for name in named
        if not (in_values(name) or in_settings(name) or in_settings(name.removeprefix("settings.")))
    }
    assert missing == set()


def row(begin: str) -> list[list[float]]:
    """Numbers of a table's row, column by column."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {begin}")]
    return [
        [float(number) for number in re.findall(r"[\d.]+", cell.replace(",", ""))] for cell in line.split("|")[2:-1]
    ]


def test_cores_follow_from_speed_and_cpu_seconds() -> None:
    for speed, all_s, api_s, cores, split in zip(
        row("the application over HTTP"),
        row("CPU seconds for an hour"),
        row("of it API replicas"),
        row("cores for one GPU"),
        row("of it the API's pods; the stages'"),
        strict=True,
    ):
        assert cores[0] == pytest.approx(speed[0] / 3600 * all_s[0], abs=0.06)
        assert split[0] == pytest.approx(speed[0] / 3600 * api_s[0], abs=0.06)
        assert split[0] + split[1] == pytest.approx(cores[0], abs=0.11)


def test_gpus_follow_from_speed() -> None:
    speeds = [cells[0] for cells in row("the application over HTTP")]
    for streams, begin in ((100, "100 recordings"), (1_000, "1,000 |"), (5_000, "5,000 |"), (10_000, "10,000 |")):
        assert [cells[0] for cells in row(begin)] == [math.ceil(streams / (0.75 * speed)) for speed in speeds]
    for hours, begin in ((10_000, "10,000 hours"), (100_000, "100,000 hours"), (1_000_000, "1,000,000 hours")):
        assert [cells[0] for cells in row(begin)] == [math.ceil(hours / (24 * speed)) for speed in speeds]
