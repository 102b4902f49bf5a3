"""The recording rules, by Prometheus' own tool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from serve_app import metrics
from tests.prometheus import RULES, program

TESTS = Path(__file__).parent / "rules.yaml"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False)


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_the_rules_are_well_formed() -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


def test_the_rules_compute_what_they_say() -> None:
    tested = promtool("test", "rules", str(TESTS))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_wrong_expectation_fails(tmp_path: Path) -> None:
    wrong = yaml.safe_load(TESTS.read_text())
    wrong["rule_files"] = [str(RULES)]
    wrong["tests"][0]["promql_expr_test"][0]["exp_samples"][0]["value"] = 0.1
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(wrong))
    assert promtool("test", "rules", str(tmp_path / "rules.yaml")).returncode != 0


def test_the_rules_use_declared_metrics_alone() -> None:
    """A rule over a name that nobody exports would be empty for ever, without an error."""
    exported = {metric.exported for metric in metrics.DECLARED.values()}
    for metric in metrics.DECLARED.values():
        if metric.kind == "histogram":
            exported |= {f"{metric.exported}_{part}" for part in ("bucket", "count", "sum")}
    used = set()
    for rule in rules():
        expression = rule["expr"].replace("ray_whisper_(stage|credit)_", "ray_whisper_stage_")
        used |= set(re.findall(r"ray_\w+", expression))
    assert used
    assert used - exported == set()
