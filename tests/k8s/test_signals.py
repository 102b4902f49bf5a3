from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from k8s.prometheus import Sample
from k8s.serve import Deployment, ServeStatus
from k8s.signals import (
    CALLER_GAUGES,
    CALLER_STAGE_GAUGES,
    DCGM_GAUGES,
    GPU_MEMORY,
    REPLICA_GAUGES,
    STAND_IN,
    rebuilt,
)
from serve_app.metrics import DECLARED
from serve_app.metrics import Gauge as DeclaredGauge
from serve_app.scaling.load import Signals, stage_signals
from serve_app.scaling.readings import API, STAGES, CallerReading, ReplicaReading
from tests.scaling.test_readings import CALLERS, REPLICAS

GPUS = {"features": 0.1, "encoder": 0.4, "decoder": 0.5}
NAMES = st.text("abc123", min_size=1, max_size=8)
UNKNOWN = {field.name for field in fields(ReplicaReading) if field.type == "float | None"}
SOME = settings(max_examples=40, deadline=None)
DECLARED_GAUGES = {metric.exported: metric for metric in DECLARED.values() if isinstance(metric, DeclaredGauge)}


def exported(signals: Signals, **more: str) -> list[Sample]:
    """As replicas and callers tell it. more: labels that the scrape adds."""
    found: list[Sample] = []

    def tell(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            found.append(Sample(name, {**labels, **more}, float(value), 0.0))

    for stage, each in signals.stages.items():
        for replica, reading in each.readings.items():
            whose = {"stage": stage, "replica": replica}
            of_gpu = {"gpu": reading.gpu or "cpu", "kind": "gpm"}
            for name, part in REPLICA_GAUGES.items():
                labels = {label: value for label, value in of_gpu.items() if label in DECLARED_GAUGES[name].labels}
                tell(name, getattr(reading, part), **whose, **labels)
            if reading.gpu is None:  # the stand-in
                tell("ray_whisper_sm_utilization", reading.busy, **whose, gpu="cpu", kind=STAND_IN)
            else:
                tell(GPU_MEMORY, 1e9, **whose, gpu=reading.gpu)
    for replica, caller in signals.callers.items():
        for name, part in CALLER_GAUGES.items():
            tell(name, getattr(caller, part), replica=replica)
        for stage in STAGES:
            for name, part in CALLER_STAGE_GAUGES.items():
                tell(name, getattr(caller, f"{stage}_{part}"), stage=stage, replica=replica)
    return found


def through_text(told: list[Sample]) -> list[Sample]:
    """As a metrics port writes them."""
    registry, gauges = CollectorRegistry(), dict[str, Gauge]()
    for sample in told:
        if sample.name not in gauges:
            gauges[sample.name] = Gauge(sample.name, "", list(sample.labels), registry=registry)
        gauges[sample.name].labels(**sample.labels).set(sample.value)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return [Sample(s.name, s.labels, s.value, 0.0) for family in families for s in family.samples]


def status(signals: Signals, more: Mapping[str, Iterable[str]] | None = None) -> ServeStatus:
    """Serve's side. more: replicas that run and have not told anything."""
    running = {stage: [*found.readings, *(more or {}).get(stage, ())] for stage, found in signals.stages.items()}
    deployments = {stage: Deployment(7, tuple(ids)) for stage, ids in running.items()}
    return ServeStatus(True, {**deployments, API: Deployment(1, tuple(signals.callers))})


def rebuild(
    signals: Signals, told: list[Sample], *, dcgm: list[Sample] | None = None, serve: ServeStatus | None = None
) -> Signals:
    targets = {stage: found.target for stage, found in signals.stages.items()}
    return rebuilt(application=told, dcgm=dcgm, serve=serve or status(signals), targets=targets, gpus=GPUS)


@st.composite
def signals(draw: st.DrawFn) -> Signals:
    stages = {}
    for stage in STAGES:
        readings = draw(st.dictionaries(NAMES, REPLICAS, max_size=3))
        # a GPU's utilization is told with its name
        readings = {
            name: reading if reading.gpu else replace(reading, sm_utilization=None, dram_utilization=None)
            for name, reading in readings.items()
        }
        target = draw(st.integers(0, 5))
        stages[stage] = stage_signals(target=target, ready=len(readings), gpus=GPUS[stage], readings=readings)
    return Signals(stages, draw(st.dictionaries(NAMES, CALLERS, max_size=2)))


@SOME
@given(signals())
def test_what_was_told_is_what_is_rebuilt(told: Signals) -> None:
    assert rebuild(told, through_text(exported(told))) == told


@SOME
@given(signals(), st.integers(1, 1000))
def test_of_two_who_tell_of_a_replica_the_newer_counts(told: Signals, older_s: int) -> None:
    def aged(reading: Any) -> Any:
        return replace(reading, at=reading.at - older_s)

    old = Signals(
        {
            stage: replace(found, readings={name: aged(reading) for name, reading in found.readings.items()})
            for stage, found in told.stages.items()
        },
        {name: aged(reading) for name, reading in told.callers.items()},
    )
    new, before = exported(told, instance="a"), exported(old, instance="b")
    assert rebuild(told, new + before) == rebuild(told, before + new) == told


@SOME
@given(signals(), st.data())
def test_a_reading_without_one_of_its_parts_or_with_no_number_for_it_is_none(
    told: Signals, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(name for name, part in REPLICA_GAUGES.items() if part not in UNKNOWN)))
    value = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    told_samples = [
        replace(sample, value=math.nan if value is None else value) if sample.name == name else sample
        for sample in exported(told)
        if value is not None or sample.name != name
    ]
    found = rebuild(told, told_samples)
    assert all(not each.readings for each in found.stages.values())
    assert {stage: each.ready for stage, each in found.stages.items()} == {s: e.ready for s, e in told.stages.items()}
    assert found.callers == told.callers


@SOME
@given(signals(), st.lists(NAMES, unique=True, max_size=2))
def test_readings_are_of_replicas_that_run(told: Signals, silent: list[str]) -> None:
    """Those of dead ones stay in Prometheus for minutes; new ones have not told yet."""
    new = {"encoder": [f"new-{name}" for name in silent]}
    found = rebuild(told, exported(told), serve=status(told, new))
    assert found.stages["encoder"].ready == told.stages["encoder"].ready + len(silent)
    assert found.stages["encoder"].readings == told.stages["encoder"].readings
    gone = ServeStatus(True, {stage: Deployment(0, ()) for stage in (*STAGES, API)})
    found = rebuild(told, exported(told), serve=gone)
    assert found.callers == {}
    assert all((each.ready, each.readings) == (0, {}) for each in found.stages.values())


@SOME
@given(signals(), signals(), st.booleans())
def test_a_reading_that_is_missing_now_is_the_one_before(told: Signals, later: Signals, lost: bool) -> None:
    """Of replicas that still run, and with its own time."""
    serve = status(told)
    now = [] if lost else exported(later)
    found = rebuilt(application=now, dcgm=None, serve=serve, targets=dict.fromkeys(STAGES, 1), gpus=GPUS, before=told)
    groups: list[tuple[Any, Any, Any]] = [
        (found.stages[s].readings, told.stages[s].readings, later.stages[s].readings) for s in STAGES
    ]
    for got, before, after in [*groups, (found.callers, told.callers, later.callers)]:
        assert set(got) == set(before)
        for name, reading in got.items():
            newer = not lost and name in after and after[name].at > before[name].at
            assert reading == (after if newer else before)[name]


@SOME
@given(signals())
def test_what_is_asked_for_and_does_not_run_is_starting(told: Signals) -> None:
    for found in rebuild(told, exported(told)).stages.values():
        assert found.pending == max(0, found.target - found.ready)


def dcgm(gpu: str, sm: float, dram: float | None, at: float) -> list[Sample]:
    values = {"DCGM_FI_PROF_SM_ACTIVE": sm, "DCGM_FI_PROF_DRAM_ACTIVE": dram}
    assert set(values) == set(DCGM_GAUGES)
    labels = {"UUID": f"GPU-{gpu}", "gpu": "0", "pod": "whisper-worker", "Hostname": "node"}
    return [Sample(name, labels, value, at) for name, value in values.items() if value is not None]


@SOME
@given(signals(), st.floats(0, 1), st.none() | st.floats(0, 1), st.floats(0, 1e6))
def test_dcgms_utilization_takes_the_place_of_the_replicas_own(
    told: Signals, sm: float, dram: float | None, at: float
) -> None:
    gpus = {reading.gpu for found in told.stages.values() for reading in found.readings.values() if reading.gpu}
    known = [sample for gpu in gpus for sample in dcgm(gpu, sm, dram, at)]
    found = rebuild(told, exported(told), dcgm=known)
    for stage, each in told.stages.items():
        for name, reading in each.readings.items():
            expected = reading
            if reading.gpu is not None:
                own = reading.dram_utilization
                expected = replace(
                    reading,
                    at=min(at, reading.at),  # as old as its oldest part
                    sm_utilization=sm,
                    dram_utilization=own if dram is None else dram,
                )
            assert found.stages[stage].readings[name] == expected


@SOME
@given(signals(), st.sampled_from([[], dcgm("00000000-0000-0000-0000-000000000000", 0.5, 0.5, 0.0)]))
def test_a_gpu_that_dcgm_does_not_know_is_not_guessed(told: Signals, known: list[Sample]) -> None:
    found = rebuild(told, exported(told), dcgm=known)
    for stage, each in told.stages.items():
        own = {name: r for name, r in each.readings.items() if r.gpu is None}
        assert found.stages[stage].readings == own


ANY = st.builds(
    Sample,
    st.sampled_from(sorted({*REPLICA_GAUGES, *CALLER_GAUGES, *CALLER_STAGE_GAUGES, *DCGM_GAUGES, "up"})),
    st.dictionaries(
        st.sampled_from(["stage", "replica", "gpu", "UUID", "kind", "instance"]),
        st.sampled_from(["encoder", "a", "", STAND_IN]),
    ),
    st.floats(),
    st.floats(0, 1e9),
)


@SOME
@given(st.lists(ANY))
def test_whatever_prometheus_holds_nothing_breaks(given: list[Sample]) -> None:
    serve = ServeStatus(True, {name: Deployment(1, ("a",)) for name in (*STAGES, API)})
    found = rebuilt(application=given, dcgm=given, serve=serve, targets=dict.fromkeys(STAGES, 1), gpus=GPUS)
    for each in found.stages.values():
        for reading in each.readings.values():
            numbers = [getattr(reading, field.name) for field in fields(reading) if field.name != "gpu"]
            assert all(number is None or math.isfinite(number) for number in numbers)


def test_every_part_of_a_reading_is_a_gauge_that_is_declared() -> None:
    assert sorted(REPLICA_GAUGES.values()) == sorted({field.name for field in fields(ReplicaReading)} - {"gpu"})
    of_stages = {f"{stage}_{part}" for stage in STAGES for part in CALLER_STAGE_GAUGES.values()}
    assert of_stages | set(CALLER_GAUGES.values()) == {field.name for field in fields(CallerReading)}
    asked = {*REPLICA_GAUGES, *CALLER_GAUGES, *CALLER_STAGE_GAUGES, GPU_MEMORY}
    assert asked <= set(DECLARED_GAUGES)
    for name in REPLICA_GAUGES:
        assert {"stage", "replica"} <= set(DECLARED_GAUGES[name].labels)


@pytest.mark.parametrize("name", CALLER_GAUGES)
def test_a_callers_own_gauges_have_no_stage(name: str) -> None:
    assert DECLARED_GAUGES[name].labels == ("replica",)
