"""The recording rules and the alerts, by Prometheus' own tool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.metrics import Metrics
from serve_app import metrics
from tests.conftest import ROOT
from tests.prometheus import RULES, program

TESTS = [Path(__file__).parent / name for name in ("rules.yaml", "alerts.yaml", "objectives.yaml")]
OPERATIONS = ROOT / "docs" / "operations.md"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False)


def rules(kind: str) -> list[dict[str, Any]]:
    """kind: record or alert."""
    groups = [group for file in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


RECORDS, ALERTS = rules("record"), rules("alert")


def cases() -> list[dict[str, Any]]:
    return [case for file in TESTS for case in yaml.safe_load(file.read_text())["tests"]]


def test_the_rules_are_well_formed() -> None:
    files = [str(file) for file in sorted(RULES.glob("*.yaml"))]
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", *files)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = sum(int(number) for number in re.findall(r"(\d+) rules found", checked.stdout))
    assert found == len(RECORDS) + len(ALERTS)


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.name)
def test_the_rules_compute_what_they_say(tests: Path) -> None:
    tested = promtool("test", "rules", str(tests))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_wrong_expectation_fails(tmp_path: Path) -> None:
    wrong = yaml.safe_load(TESTS[0].read_text())
    wrong["rule_files"] = [str(RULES / "recording.yaml")]
    wrong["tests"] = wrong["tests"][:1]
    wrong["tests"][0]["promql_expr_test"][0]["exp_samples"][0]["value"] = 0.1
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(wrong))
    assert promtool("test", "rules", str(tmp_path / "rules.yaml")).returncode != 0


def test_every_recording_rule_has_a_value_in_a_unit_test() -> None:
    tested: set[str] = set()
    for case in cases():
        for expected in case.get("promql_expr_test", []):
            if expected["exp_samples"]:
                tested |= set(re.findall(r"whisper:[\w:]+", expected["expr"]))
    assert {rule["record"] for rule in RECORDS} - tested == set()


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(rule: dict[str, Any]) -> None:
    expected = [
        test["exp_alerts"]
        for case in cases()
        for test in case.get("alert_rule_test", [])
        if test["alertname"] == rule["alert"]
    ]
    assert any(expected)
    assert not all(expected)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_where_its_section_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
    section = re.search(rf"^### {rule['alert']}\n+(.+?)(?=^##|\Z)", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    assert section, "no section"
    assert len(section[1].split()) > 20, section[1]


def test_every_section_of_the_runbook_is_of_an_alert() -> None:
    _, runbook = OPERATIONS.read_text().split("\n## Runbook\n")
    assert re.findall(r"^### (\w+)$", runbook, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_the_rules_use_what_is_exported_alone() -> None:
    """A rule over a name that nobody exports would be empty for ever, without an error."""
    exported = {metric.exported for metric in metrics.DECLARED.values()}
    for metric in metrics.DECLARED.values():
        if metric.kind == "histogram":
            exported |= {f"{metric.exported}_{part}" for part in ("bucket", "count", "sum")}
    exported |= {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    exported |= {family.name for family in Metrics().registry.collect()}
    exported |= {rule["record"] for rule in RECORDS}
    used: set[str] = set()
    for rule in [*RECORDS, *ALERTS]:
        for expression in alternatives(rule["expr"]):
            used |= set(re.findall(r"\b(?:ray_|whisper_|whisper:)[\w:]+", expression))
    labels = {"whisper_release"}
    assert used - labels
    assert used - labels - exported == set()


def alternatives(expression: str) -> list[str]:
    """An expression that names metrics by a pattern, (a|b)c or (a)?c, once for each name."""
    optional = re.sub(r"\((\w+)\)\?", r"(\1|)", expression)
    choice = re.search(r"\((\w+(?:\|\w*)+)\)", optional)
    if choice is None:
        return [optional]
    return [
        each
        for option in choice[1].split("|")
        for each in alternatives(optional[: choice.start()] + option + optional[choice.end() :])
    ]
