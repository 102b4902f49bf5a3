from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k8s.loop import WARNINGS
from k8s.metrics import OUTCOMES, Health, Metrics, Port
from k8s.serve import ServeError
from serve_app import metrics as application
from serve_app.scaling.changes import Change
from serve_app.scaling.readings import STAGES
from tests.conftest import ROOT, free_port

DOCS = ROOT / "docs"
UNITS = {
    "whisper_scaling_decisions_total": "decisions",
    "whisper_controller_leader": "0 or 1",
    "whisper_controller_config_valid": "0 or 1",
    "whisper_controller_ticks_total": "rounds",
    "whisper_controller_signal_age_seconds": "s",
    "whisper_controller_scale_requests_total": "requests",
    "whisper_controller_last_tick_timestamp_seconds": "Unix time",
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def rows(metrics: Metrics) -> Iterator[str]:
    collectors: list[Any] = list(metrics.registry._collector_to_names)
    for metric in collectors:
        if not hasattr(metric, "_documentation"):
            continue  # the process's own
        counter = metric._type == "counter"
        name = f"{metric._name}_total" if counter else metric._name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "–"
        unit = UNITS.get(name, "replicas")
        yield f"| `{name}` | {metric._type} | {labels} | {unit} | {metric._documentation} |"


def test_the_documentation_has_every_metric_as_declared_and_no_other(metrics: Metrics) -> None:
    documented = [line for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith("| `whisper_")]
    assert sorted(documented) == sorted(rows(metrics))


def test_what_a_policy_inside_serve_shows_has_the_same_name_here(metrics: Metrics) -> None:
    own = set(rows(metrics))
    for metric in (application.SCALING_DECISIONS, application.SCALING_WANTED, application.SCALING_CURRENT):
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        name = metric.exported.removeprefix("ray_")
        assert f"| `{name}` | {metric.kind} | {labels} | {metric.unit} | {metric.help} |" in own


def test_every_outcome_is_shown_from_the_start_and_documented(metrics: Metrics) -> None:
    text = (DOCS / "metrics.md").read_text()
    of_serve: list[type[ServeError]] = [ServeError, *ServeError.__subclasses__()]
    assert {error.outcome for error in of_serve} <= set(OUTCOMES)
    assert set(WARNINGS) | {"ok", "standby", "api_unreachable"} == set(OUTCOMES)
    for outcome in OUTCOMES:
        assert metrics.registry.get_sample_value("whisper_controller_ticks_total", {"outcome": outcome}) == 0
        assert f"`{outcome}`" in text
    events = (DOCS / "scaling.md").read_text()
    told = re.findall(r'_tell\(\s*"(\w+)"|\.tell\(\s*"(\w+)"', (ROOT / "k8s" / "loop.py").read_text())
    for reason in {*WARNINGS.values(), *("".join(each) for each in told)}:
        assert f"`{reason}`" in events


def test_a_decision_shows(metrics: Metrics) -> None:
    metrics.decided(Change("encoder", 2, 3, 1, "burst", "words"))
    labels = {"stage": "encoder", "direction": "up", "reason": "burst"}
    assert metrics.registry.get_sample_value("whisper_scaling_decisions_total", labels) == 1
    assert metrics.registry.get_sample_value("whisper_scaling_wanted_replicas", {"stage": "encoder"}) == 3
    assert metrics.registry.get_sample_value("whisper_scaling_current_replicas", {"stage": "encoder"}) == 1
    for stage in STAGES:
        labels = {"stage": stage, "direction": "down", "reason": "fewer"}
        assert metrics.registry.get_sample_value("whisper_scaling_decisions_total", labels) == 0


def test_the_port_tells_metrics_and_health(metrics: Metrics) -> None:
    now = 100.0
    health = Health(30.0, clock=lambda: now)
    port = Port(port=0, metrics=metrics, health=health)
    try:
        url = f"http://127.0.0.1:{port.number}"
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        assert {"whisper_controller_leader", "process_cpu_seconds"} <= {family.name for family in families}
        now += 30
        assert httpx.get(f"{url}/healthz").status_code == 200
        now += 1
        assert httpx.get(f"{url}/healthz").status_code == 503
        health.beat()
        assert httpx.get(f"{url}/healthz?verbose").status_code == 200
        assert httpx.get(url).status_code == 404
        with pytest.raises(OSError, match="in use"):
            Port(port=port.number, metrics=metrics, health=health)
    finally:
        port.close()


def test_a_port_is_the_one_that_was_asked_for(metrics: Metrics) -> None:
    wanted = free_port()
    port = Port(port=wanted, metrics=metrics, health=Health(1.0))
    port.close()
    assert port.number == wanted
