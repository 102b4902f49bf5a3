"""What dashboards and alerts get from a real Prometheus that scrapes the running application and a controller."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from k8s.metrics import OUTCOMES, Health, Metrics, Port
from loadtest.recording import send, targets
from serve_app.scaling.changes import Change
from serve_app.scaling.readings import STAGES
from tests.metrics.boards import CONTROLLER, GPU, SCALING, asked
from tests.prometheus import Prometheus, prometheus

LOAD_S = 15.0
"""Rates want several scrapes."""


@pytest.fixture(scope="module")
def controller() -> Iterator[Port]:
    """The port of a controller that leads, with its own metrics on it."""
    metrics = Metrics()
    metrics.leader.set(1)
    metrics.config_valid.set(1)
    metrics.last_tick.set_function(time.time)
    metrics.ages(dict.fromkeys(STAGES, 0.5))
    for stage in STAGES:
        metrics.decided(Change(stage, before=1, target=2, ready=1, reason="queue", words="windows wait"))
        metrics.requests.labels(stage, "done").inc()
    for outcome in OUTCOMES:
        metrics.ticks.labels(outcome).inc()
    with closing(Port(port=0, metrics=metrics, health=Health(silent_s=60.0))) as port:
        yield port


@pytest.fixture(scope="module")
def observed(application: str, controller: Port, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen some load."""
    with prometheus(tmp_path_factory.mktemp("prometheus"), [*targets(), f"127.0.0.1:{controller.number}"]) as server:
        assert send(application, LOAD_S, clients=2) > 0
        time.sleep(3)  # Ray's processes report once a second
        yield server


@pytest.mark.parametrize("board", sorted({each.board for each in asked()}))
def test_every_query_of_a_dashboard_has_data(application: str, observed: Prometheus, board: str) -> None:
    """But those of GPUs, which are only understood: there is none here, and recordings have them
    (tests/metrics/test_dashboards.py)."""
    on_gpu = [each for each in asked() if each.board == board and GPU in each.of]
    for each in on_gpu:
        observed.query(each.expression)  # an error where it is not understood
    missing = [each.expression for each in asked() if each.board == board and each not in on_gpu]
    deadline = time.monotonic() + 150
    while missing := [expression for expression in missing if not observed.query(expression)]:
        # where the machine is busy, a gauge may be late, and Ray forgets it for a while; some are only known under load
        assert time.monotonic() < deadline, "\n".join(missing)
        assert send(application, LOAD_S / 3, clients=2) > 0


def test_the_controllers_own_metrics_are_on_the_dashboard_of_scaling(observed: Prometheus) -> None:
    wanted = [each for each in asked() if each.of & {SCALING, CONTROLLER}]
    assert {each.board for each in wanted} == {"scaling.json"}
    assert len(wanted) >= 14
    exported = {family.name for family in Metrics().registry.collect() if family.name.startswith("whisper_controller_")}
    on_the_board = " ".join(each.expression for each in wanted)
    assert {name for name in exported if name not in on_the_board} == set()


def test_rules_and_alerts_are_evaluated_and_a_healthy_service_raises_none(observed: Prometheus) -> None:
    assert observed.rule_errors() == {}
    assert observed.query('ALERTS{alertstate="firing"}') == {}
