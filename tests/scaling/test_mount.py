from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.app import build
from serve_app.scaling import mount
from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.mount import ServePolicy, signals_of
from serve_app.scaling.readings import STAGES, CallerReading, ReplicaReading, encode
from serve_app.scaling.replay import Entry, read, replay
from serve_app.settings import Settings
from tests.scaling.test_readings import CALLERS, REPLICAS, SERVES_OWN

GPUS = {"features": 0.1, "encoder": 0.4, "decoder": 0.5}
APP = "whisper"
IDLE = ReplicaReading(0.0, 0.0, None, None, None, 1.0, 0.0, 0, 0.0, 0.0, 0, None, True, 0.0)
CALLER = CallerReading(0.0, 0, 0, 0.0, 0.0, 0, 0.0, 0.0, 0, 0.0, 0.0)

Contexts = dict[DeploymentID, AutoscalingContext]


def context(name: str, target: int, reports: Mapping[str, list[dict[str, float]]]) -> AutoscalingContext:
    """As Serve makes it. reports: by replica, oldest first, what each said of itself; Serve keeps a series a number."""
    deployment = DeploymentID(name, APP)
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, series in reports.items():
        for at, values in enumerate(series):
            for key, value in values.items():
                points = raw.setdefault(key, {}).setdefault(ReplicaID(replica, deployment), [])
                points.append(TimeStampedValue(float(at), value))
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=name,
        app_name=APP,
        current_num_replicas=len(reports),
        target_num_replicas=target,
        running_replicas=[ReplicaID(replica, deployment) for replica in reports],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(),
    )


def contexts(stages: Mapping[str, tuple[int, Mapping[str, ReplicaReading]]], caller: CallerReading) -> Contexts:
    """stages: target and readings of each."""
    found = {name: context(name, t, {r: [encode(x)] for r, x in own.items()}) for name, (t, own) in stages.items()}
    found["api"] = context("api", 1, {"caller": [encode(caller)]})
    return {DeploymentID(name, APP): each for name, each in found.items()}


@dataclass
class Clock:
    """In place of the module ``time``."""

    now: float = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mount, "time", clock)
    return clock


def busy(at: float, demand: float) -> ReplicaReading:
    """A replica that could do 10 s of audio a second; what is beyond waits."""
    done = min(10.0, demand)
    waiting = max(0.0, demand - 10.0)
    return replace(
        IDLE,
        at=at,
        busy=done / 10,
        fill=done / 10,
        done_s=done,
        rate=10.0,
        queued_s=waiting,
        queued_windows=int(waiting),
    )


def drive(policy: ServePolicy, clock: Clock, seconds: int, demand: float, targets: dict[str, int]) -> None:
    """One replica of each stage, which Serve asks the policy about ten times a second; others never start."""
    for _ in range(10 * seconds):
        clock.now += 0.1
        stages = {stage: (targets[stage], {f"{stage}-1": busy(clock.now, demand)}) for stage in STAGES}
        counts, state = policy(contexts(stages, replace(CALLER, at=clock.now)))
        assert state == {}
        targets |= {deployment.name: count for deployment, count in counts.items()}


ENCODED = st.lists(REPLICAS, min_size=1, max_size=3)


@given(
    st.fixed_dictionaries(
        {stage: st.dictionaries(st.text("abc", min_size=1), ENCODED, max_size=3) for stage in STAGES}
    ),
    st.dictionaries(st.text("xyz", min_size=1), CALLERS, max_size=2),
    st.integers(0, 5),
)
def test_signals_are_the_newest_readings(
    stages: dict[str, dict[str, list[ReplicaReading]]], callers: dict[str, CallerReading], target: int
) -> None:
    given_contexts = {
        stage: context(stage, target, {r: [encode(x) | SERVES_OWN for x in series] for r, series in replicas.items()})
        for stage, replicas in stages.items()
    }
    given_contexts["api"] = context("api", 1, {r: [encode(x)] for r, x in callers.items()})
    signals = signals_of(given_contexts, GPUS)
    assert dict(signals.callers) == callers
    for stage, replicas in stages.items():
        found = signals.stages[stage]
        newest = {replica: series[-1] for replica, series in replicas.items()}
        assert found.readings == newest
        assert found.devices == {replica: r.gpu for replica, r in newest.items() if r.gpu is not None}
        assert (found.target, found.ready, found.gpus) == (target, len(replicas), GPUS[stage])
        assert found.pending == max(0, target - len(replicas))


@given(st.data())
def test_a_report_that_is_no_reading_counts_as_none(data: st.DataObject) -> None:
    broken = encode(IDLE)
    del broken[data.draw(st.sampled_from([field.name for field in fields(IDLE) if field.name != "gpu"]))]
    reports = {"old": [broken], "new": [encode(IDLE)], "silent": []}
    signals = signals_of({stage: context(stage, 3, reports) for stage in STAGES}, GPUS)
    assert all(list(each.readings) == ["new"] and each.ready == 3 for each in signals.stages.values())


def policy(tmp_path: Path, **given: Any) -> ServePolicy:
    settings = ScalingSettings(enabled=True, decision_log=tmp_path / "log.jsonl", **given)
    return ServePolicy(settings.model_dump(mode="json"), GPUS)


def entries(tmp_path: Path) -> list[Entry]:
    return [line for line in read(tmp_path / "log.jsonl") if isinstance(line, Entry)]


def test_it_decides_once_a_period_and_repeats_itself_in_between(tmp_path: Path, clock: Clock) -> None:
    drive(policy(tmp_path), clock, 20, 3.0, dict.fromkeys(STAGES, 1))
    times = [entry.now for entry in entries(tmp_path)]
    assert 0.8 * 20 / mount.PERIOD_S <= len(times) <= 20 / mount.PERIOD_S
    assert min(b - a for a, b in itertools.pairwise(times)) >= mount.PERIOD_S - 1e-6


@pytest.mark.parametrize("topology", ["colocated", "split"])
def test_more_load_brings_replicas_and_a_replay_decides_the_same(tmp_path: Path, clock: Clock, topology: str) -> None:
    targets = dict.fromkeys(STAGES, 1)
    mounted = policy(tmp_path, topology=topology)
    drive(mounted, clock, 10, 3.0, targets)
    assert targets == dict.fromkeys(STAGES, 1)
    stepped = clock.now
    drive(mounted, clock, 5, 30.0, targets)
    assert all(count > 1 for count in targets.values())
    more = next(entry for entry in entries(tmp_path) if entry.decision.targets["features"] > 1)
    assert more.now - stepped <= 3.0
    count, differences = replay(tmp_path / "log.jsonl")
    assert count == len(entries(tmp_path))
    assert differences == []


def test_each_start_is_replayed_from_nothing(tmp_path: Path, clock: Clock) -> None:
    for _ in range(2):
        drive(policy(tmp_path), clock, 5, 5.0, dict.fromkeys(STAGES, 1))
    assert replay(tmp_path / "log.jsonl") == (len(entries(tmp_path)), [])


def test_while_a_stage_is_missing_nothing_is_decided(tmp_path: Path, clock: Clock) -> None:
    some = {stage: (1, {f"{stage}-1": IDLE}) for stage in ("features", "encoder")}
    assert policy(tmp_path)(contexts(some, CALLER)) == ({}, {})
    assert not (tmp_path / "log.jsonl").exists()


def test_an_error_is_logged_once_and_replicas_stay(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    targets = dict.fromkeys(STAGES, 1)
    with caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        try:
            drive(policy(tmp_path / "nowhere"), clock, 5, 3.0, targets)
        finally:
            logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert targets == dict.fromkeys(STAGES, 1)
    assert {"replicas stay as they are" in record.message for record in caplog.records} == {True}
    assert len({record.exc_text or str(record.exc_info) for record in caplog.records}) == 1


def run_replay(log: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.scaling.replay", str(log)], capture_output=True, text=True, check=False
    )


def test_a_decision_that_the_policy_does_not_make_is_found(tmp_path: Path, clock: Clock) -> None:
    drive(policy(tmp_path), clock, 3, 5.0, dict.fromkeys(STAGES, 1))
    log = tmp_path / "log.jsonl"
    assert run_replay(log).returncode == 0
    lines = log.read_text().splitlines()
    changed = json.loads(lines[2])
    changed["decision"]["targets"]["encoder"] = 7
    log.write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]]))
    result = run_replay(log)
    assert result.returncode == 1
    assert "line 3" in result.stdout
    assert f"{len(lines) - 2} of {len(lines) - 1} decisions are the same" in result.stdout


@pytest.mark.parametrize("text", ["no json", "{}", '{"now": 1}'])
def test_what_is_no_decision_log_is_named(tmp_path: Path, clock: Clock, text: str) -> None:
    drive(policy(tmp_path), clock, 2, 5.0, dict.fromkeys(STAGES, 1))
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + f"\n{text}\n")
    result = run_replay(log)
    assert result.returncode == 2
    assert "line 2" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run_replay(tmp_path / "nothing.jsonl")
    assert result.returncode == 2
    assert "nothing.jsonl" in result.stderr


def test_a_decision_before_its_configuration_is_named(tmp_path: Path, clock: Clock) -> None:
    drive(policy(tmp_path), clock, 2, 5.0, dict.fromkeys(STAGES, 1))
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match="line 1: a decision, but no configuration"):
        replay(log)


def deployments(settings: Settings) -> dict[str, Any]:
    """The application's, by name."""
    api = build(settings)._bound_deployment
    stages = [each._bound_deployment for each in api.init_args if hasattr(each, "_bound_deployment")]
    return {each.name: each for each in [api, *stages]}


def test_without_autoscaling_numbers_are_fixed() -> None:
    found = deployments(Settings(encoder={"replicas": 3}, http={"replicas": 2}))
    assert {name: each.num_replicas for name, each in found.items()} == {
        "api": 2, "features": 1, "encoder": 3, "decoder": 1,
    }  # fmt: skip
    assert all(each._deployment_config.autoscaling_config is None for each in found.values())


def bounds(settings: Settings) -> dict[str, tuple[int, int, int]]:
    found = {name: each._deployment_config.autoscaling_config for name, each in deployments(settings).items()}
    assert all(c.upscale_delay_s == c.downscale_delay_s == c.downscale_to_zero_delay_s == 0 for c in found.values())
    return {name: (c.min_replicas, c.initial_replicas, c.max_replicas) for name, c in found.items()}


def test_limits_of_the_topology_are_serves() -> None:
    scaling = {"enabled": True, "pods": {"min_replicas": 2, "max_replicas": 5}}
    given = Settings(scaling=scaling, encoder={"replicas": 3}, http={"replicas": 2})
    assert bounds(given) == {"api": (2, 2, 2), **dict.fromkeys(STAGES, (2, 3, 5))}
    scaling = {"enabled": True, "topology": "split", "decoder": {"max_replicas": 2}, "encoder": {"min_replicas": 0}}
    given = Settings(scaling=scaling, decoder={"replicas": 4})
    assert bounds(given) == {"api": (1, 1, 1), "features": (1, 1, 8), "encoder": (0, 1, 8), "decoder": (1, 2, 2)}
