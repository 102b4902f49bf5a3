"""The declarations, and that the documentation has just these."""

from __future__ import annotations

import itertools
import re

import pytest

from serve_app import metrics
from serve_app.metrics import DECLARED, Counter, Histogram, Metric
from tests.conftest import ROOT

DOCS = ROOT / "docs" / "metrics.md"
NAME = re.compile(r"whisper(_[a-z]+)+")


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
    return f"| `{metric.exported}` | {metric.kind} | {labels} | {metric.unit} | {metric.help} |"


def test_the_documentation_has_every_metric_as_declared_and_no_other() -> None:
    documented = [line for line in DOCS.read_text().splitlines() if line.startswith("| `ray_whisper_")]
    assert sorted(documented) == sorted(row(metric) for metric in DECLARED.values())


def test_every_metric_that_the_documentation_names_is_declared() -> None:
    exported = {metric.exported for metric in DECLARED.values()}
    parts = {f"{e}_{part}" for e in exported for part in ("bucket", "count", "sum")}
    named = set(re.findall(r"ray_whisper_\w+", DOCS.read_text()))
    assert named - exported - parts == set()


def test_every_recording_rule_is_documented() -> None:
    rules = ROOT / "helm" / "whisper-serve" / "rules" / "recording.yaml"
    recorded = set(re.findall(r"record: (\S+)", rules.read_text()))
    documented = set(re.findall(r"whisper:[\w:]+", DOCS.read_text()))
    assert documented == recorded


@pytest.mark.parametrize("metric", DECLARED.values(), ids=lambda metric: metric.name)
def test_names_and_buckets_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert NAME.fullmatch(metric.name)
    assert metric.help.endswith(".")
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert len(set(metric.labels)) == len(metric.labels)
    if isinstance(metric, Histogram):
        assert metric.buckets[0] > 0
        assert all(a < b for a, b in itertools.pairwise(metric.buckets))


def test_a_name_is_declared_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        Counter("whisper_requests", "requests", (), "Again.")


@pytest.mark.parametrize("labels", [{}, {"stage": "encoder", "outcome": "done", "more": "x"}])
def test_a_value_without_just_its_labels_is_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="label"):
        metrics.STAGE_WINDOWS.add(**labels)
