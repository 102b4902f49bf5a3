from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

from loadtest import report


def test_a_report_names_command_date_commit_hardware_and_versions() -> None:
    environment = report.environment()
    assert environment.keys() == {"command", "date", "commit", "hardware", "versions"}
    assert environment["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert environment["versions"]["ray"] == metadata.version("ray")


def test_raw_results_are_written_as_json_that_people_can_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    report.write_json(path, {"text": "你好"})
    assert json.loads(path.read_text()) == {"text": "你好"}
    assert "你好" in path.read_text()
