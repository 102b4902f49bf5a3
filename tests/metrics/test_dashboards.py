"""Grafana's dashboards: what lies in the chart's folder, and what its queries find in recordings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.dashboards.__main__ import FOLDER
from loadtest.dashboards.boards import boards
from tests.metrics.boards import CONTROLLER, GPU, SCALING, Asked, asked
from tests.metrics.replayed import Recording

TWELVE = {
    "sm_utilization",
    "dram_bytes_per_second",
    "stage_flops",
    "gpu_memory_used",
    "gpu_power_watts",
    "stage_batch_windows",
    "stage_queue_windows",
    "stage_wait_seconds",
    "stage_latency_seconds",
    "request_seconds",
    "rtfx",
    "tokens_per_second",
    "stage_errors",
    "stage_retries",
}
"""Of docs/metrics.md, some of which are two."""

BOARDS = {name: json.loads(text) for name, text in boards().items()}


def test_the_files_are_what_the_generator_writes() -> None:
    assert {file.name: file.read_text() for file in FOLDER.glob("*")} == boards()


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_asks_the_source_and_the_releases_that_were_chosen(board: dict[str, Any]) -> None:
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "namespace", "release"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"].endswith("."), panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert (
                'namespace=~"$namespace",whisper_release=~"$release"' in target["expr"] or "ALERTS" in target["expr"]
            ), target["expr"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_no_panel_lies_on_another_or_outside(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboards_have_names_of_their_own() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


def test_the_overview_has_the_twelve() -> None:
    expressions = " ".join(each.expression for each in asked() if each.board == "overview.json")
    assert {name for name in TWELVE if f"whisper:{name}" not in expressions} == set()


def test_queries_of_the_application_have_data_in_every_recording(recording: Recording) -> None:
    wanted = [each for each in asked() if not each.of & {GPU, SCALING, CONTROLLER}]
    assert len(wanted) > 50
    assert empty(wanted, recording) == []


def test_queries_of_gpus_have_data_in_recordings_of_gpus(recording: Recording) -> None:
    wanted = [each for each in asked() if GPU in each.of]
    assert len(wanted) > 15
    if not recording.of_gpus:
        pytest.skip("no GPU was recorded: python -m loadtest.gpu.serving --record makes such a recording")
    assert empty(wanted, recording) == []


def empty(wanted: list[Asked], recording: Recording) -> list[Asked]:
    return [each for each in wanted if not recording.has(each.expression)]
