from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.scaling.config import Limits, ScalingSettings
from serve_app.scaling.load import Signals, StageSignals
from serve_app.scaling.policy import PODS, Decision, State, decide, suffices
from serve_app.scaling.readings import STAGES, CallerReading, ReplicaReading

NOW = 1_700_000_000.0
RATE = 100.0
"""Seconds of audio a second of one replica at its saturation point."""


def config(**changes: Any) -> ScalingSettings:
    wide = Limits(min_replicas=1, max_replicas=100)
    values: dict[str, Any] = {"topology": "split", "features": wide, "encoder": wide, "decoder": wide, "pods": wide}
    return ScalingSettings(**{**values, "cold_start_s": 30.0, **changes})


def reading(at: float, *, used: float = 0.5, queued_s: float = 0.0, bound: bool = False, **more: Any) -> ReplicaReading:
    values: dict[str, Any] = {
        "at": at,
        "busy": used,
        "gpu_share": used,
        "sm_utilization": used * 0.8,
        "dram_utilization": used * 0.5,
        "saturation": 0.8,
        "fill": used,
        "queued_windows": round(queued_s / 30),
        "queued_s": queued_s,
        "oldest_wait_s": queued_s / RATE,
        "running_windows": 4,
        "rate": RATE,
        "budget_at_bound": bound,
        "done_s": used * RATE,
    }
    return ReplicaReading(**{**values, **more})


def stage(count: int, one: ReplicaReading | None, *, pending: int = 0, heard: int | None = None) -> StageSignals:
    names = range(count if heard is None else heard)
    return StageSignals(count + pending, count, pending, 1.0, {str(i): one for i in names if one is not None})


def signals(count: int, one: ReplicaReading | None, **more: Any) -> Signals:
    return Signals({name: stage(count, one, **more) for name in STAGES})


def settled(count: int, used: float, config: ScalingSettings, seconds: int = 400) -> State:
    """After a steady load."""
    state = State()
    for second in range(seconds):
        at = NOW - seconds + second
        state, _ = decide(config, state, signals(count, reading(at, used=used)), at)
    return state


def follow(
    state: State, config: ScalingSettings, seen: Callable[[float], Signals], seconds: int, start: float = NOW
) -> tuple[State, list[Decision]]:
    decisions = []
    for second in range(seconds):
        state, decision = decide(config, state, seen(start + second), start + second)
        decisions.append(decision)
    return state, decisions


def test_a_steady_load_changes_nothing() -> None:
    state = settled(4, 0.7, config())
    _, decisions = follow(state, config(), lambda at: signals(4, reading(at, used=0.7)), 300)
    assert all(d.targets == dict.fromkeys(STAGES, 4) for d in decisions)
    assert {d.units["decoder"].reason for d in decisions} <= {"steady"}


def test_a_load_step_wants_replicas_within_three_seconds_as_many_as_it_takes() -> None:
    state = settled(4, 0.5, config())

    # Twice the load of 200: the replicas do all they can, the rest waits.
    def seen(at: float) -> Signals:
        waits = (at - NOW + 1) * 60
        return signals(4, reading(at, used=1.0, queued_s=waits / 4, bound=True))

    _, decisions = follow(state, config(), seen, 3)
    last = decisions[-1].units["features"]
    assert last.target >= math.ceil(460 / RATE)
    assert last.reason in ("burst", "demand", "queue")
    assert str(last.target) in last.words


def test_work_known_at_the_first_stage_scales_the_later_ones_before_they_notice() -> None:
    state = settled(4, 0.5, config())

    def seen(at: float) -> Signals:
        busy = stage(4, reading(at, used=1.0, queued_s=(at - NOW + 1) * 100, bound=True))
        calm = stage(4, reading(at, used=0.5))
        return Signals({"features": busy, "encoder": calm, "decoder": calm})

    _, decisions = follow(state, config(), seen, 4)
    assert decisions[-1].targets["decoder"] > 4


def test_batches_grow_first() -> None:
    state = settled(4, 0.7, config())

    def seen(at: float, bound: bool) -> Signals:
        return signals(4, reading(at, used=0.84, bound=bound))

    _, growing = follow(state, config(), lambda at: seen(at, False), 20)
    assert {d.targets["encoder"] for d in growing} == {4}
    assert growing[-1].units["encoder"].reason == "batches_first"
    _, full = follow(state, config(), lambda at: seen(at, True), 20)
    assert full[-1].targets["encoder"] == 5


def test_the_decoder_is_judged_by_the_fullest_of_its_resources() -> None:
    state = settled(4, 0.5, config())
    for changes in ({"dram_utilization": 0.97}, {"fill": 0.97, "busy": 1.0}):
        _, decisions = follow(state, config(), lambda at, c=changes: signals(4, reading(at, bound=True, **c)), 5)  # type: ignore[misc]
        assert decisions[-1].units["decoder"].utilization == pytest.approx(0.97)
        assert decisions[-1].units["encoder"].utilization == pytest.approx(0.5)


@pytest.mark.parametrize("topology", ["colocated", "split"])
def test_next_to_nothing_is_no_rate(topology: str) -> None:
    seen = signals(2, reading(NOW, done_s=1e-307, rate=1e-307, queued_s=60.0))
    _, decision = decide(config(topology=topology), State(), seen, NOW)
    assert {unit.reason for unit in decision.units.values()} == {"measuring"}


def test_slots_count_for_the_time_in_which_the_decoder_ran() -> None:
    seen = signals(4, reading(NOW, used=0.1, fill=0.5))
    _, decision = decide(config(), State(), seen, NOW)
    assert decision.units["decoder"].utilization == pytest.approx(0.1)


def test_what_arrives_at_the_callers_is_answered_before_anything_was_done() -> None:
    state = settled(4, 0.7, config(up_hold_s=0.0))

    def caller(at: float, arrived: float) -> CallerReading:
        return CallerReading(at, 1, 0, 0.0, 0.0, 0, 0.0, 0.0, 0, 0.0, 0.0, arrived)

    def seen(at: float, *callers: CallerReading) -> Signals:
        said = {str(i): each for i, each in enumerate(callers)}
        return replace(signals(4, reading(at, used=0.7, bound=True)), callers=said)

    _, quiet = follow(state, config(up_hold_s=0.0), lambda at: seen(at, caller(at, 140.0), caller(at, 140.0)), 10)
    assert quiet[-1].targets == dict.fromkeys(STAGES, 4)
    _, busy = follow(state, config(up_hold_s=0.0), lambda at: seen(at, caller(at, 140.0), caller(at, 660.0)), 3)
    assert busy[-1].targets == dict.fromkeys(STAGES, math.ceil(800 / 0.75 / RATE))
    # where one has not told, what is done counts
    late = caller(NOW - 60, 700.0)
    _, partly = follow(state, config(up_hold_s=0.0), lambda at: seen(at, caller(at, 700.0), late), 10)
    assert partly[-1].targets == dict.fromkeys(STAGES, 4)


def test_fewer_come_late_and_in_steps_that_suffice() -> None:
    settings_ = config(down_hold_s=60.0)
    state = settled(8, 0.7, settings_)
    _, decisions = follow(state, settings_, lambda at: signals(8, reading(at, used=0.2)), 300)
    first = next(i for i, d in enumerate(decisions) if d.targets["encoder"] < 8)
    assert first >= 60
    assert decisions[first].units["encoder"].reason == "fewer"
    for decision in decisions:
        assert decision.targets["encoder"] * RATE >= 0.2 * 8 * RATE


@settings(deadline=None, max_examples=25)
@given(heard=st.integers(0, 7), used=st.floats(0.0, 1.0))
def test_it_never_scales_down_blind(heard: int, used: float) -> None:
    settings_ = config(down_hold_s=20.0)
    state = settled(8, 0.7, settings_, seconds=30)
    _, decisions = follow(state, settings_, lambda at: signals(8, reading(at, used=used), heard=heard), 60)
    assert all(d.targets["encoder"] >= 8 for d in decisions)


def test_stale_readings_hold() -> None:
    state = settled(4, 0.7, config())
    old = reading(NOW - 1, used=0.0)
    _, decisions = follow(state, config(), lambda at: signals(4, old), 600)
    assert all(d.targets == dict.fromkeys(STAGES, 4) for d in decisions)
    assert decisions[-1].units["encoder"].reason == "stale"


def test_pending_replicas_are_not_ordered_again() -> None:
    state = settled(4, 0.5, config())
    target = 4
    targets = []
    for second in range(25):
        at = NOW + second
        one = reading(at, used=1.0, queued_s=50.0 * second, bound=True)
        seen = Signals({name: stage(4, one, pending=target - 4) for name in STAGES})
        state, decision = decide(config(), state, seen, at)
        target = decision.targets["encoder"]
        targets.append(target)
    demand = (4 * RATE + 4 * 50) / RATE
    assert demand <= targets[3] <= math.ceil(demand / 0.75) + 1
    # What waits is to be worked off too, but not as if nothing were on its way.
    assert targets[-1] <= targets[3] + math.ceil(4 * 50 * 25 / 15 / RATE) + 1
    assert sorted(targets) == targets


def test_scale_to_zero_and_back() -> None:
    none = Limits(min_replicas=0, max_replicas=5)
    settings_ = config(topology="colocated", pods=none, zero_after_s=100.0)
    state = State()
    idle: dict[str, Any] = {"used": 0.0, "rate": None}
    _, decisions = follow(state, settings_, lambda at: signals(1, reading(at, **idle)), 120)
    assert decisions[50].targets["decoder"] == 1
    assert decisions[-1].targets == dict.fromkeys(STAGES, 0)
    assert decisions[-1].units[PODS].reason == "idle"
    empty = {name: StageSignals(0, 0, 0) for name in STAGES}
    assert decide(settings_, state, Signals(empty), NOW)[1].targets["decoder"] == 0
    held = CallerReading(NOW, 1, 1, 30.0, 0.1, 0, 0.0, 0.0, 0, 0.0, 0.0)
    _, decision = decide(settings_, state, Signals(empty, {"api": held}), NOW)
    assert decision.targets["decoder"] == 1
    assert decision.units[PODS].reason == "wake"


def test_zero_is_not_reached_without_leave() -> None:
    settings_ = config(features=Limits(min_replicas=0, max_replicas=5))
    _, decisions = follow(State(), settings_, lambda at: signals(1, reading(at, used=0.0, rate=None)), 700)
    assert all(d.targets["features"] == 1 for d in decisions)


def test_pods_share_a_gpu_and_get_one_number() -> None:
    settings_ = config(topology="colocated")
    shares = {"features": 0.05, "encoder": 0.3, "decoder": 0.45}

    def seen(at: float) -> Signals:
        stages = {}
        for name in STAGES:
            one = reading(at, used=0.5, sm_utilization=0.8, gpu_share=shares[name], fill=0.1, dram_utilization=0.1)
            stages[name] = replace(stage(4, one), devices={str(i): f"gpu{i}" for i in range(4)}, gpus=1 / 3)
        return Signals(stages)

    _, decisions = follow(State(), settings_, seen, 5)
    # All of the GPU's work together is at the saturation point: 0.8 of 0.8.
    assert decisions[-1].units[PODS].utilization == pytest.approx(1.0)
    assert decisions[-1].units[PODS].rate == pytest.approx(50.0)
    assert set(decisions[-1].targets) == set(STAGES)
    assert len(set(decisions[-1].targets.values())) == 1


def test_a_budget_of_gpus_is_never_exceeded_and_balances() -> None:
    settings_ = config(gpu_budget=10.0)
    state = settled(3, 0.6, settings_)

    def seen(at: float) -> Signals:
        slow = reading(at, used=1.0, done_s=50.0, queued_s=(at - NOW) * 200, bound=True)
        fast = reading(at, used=1.0, done_s=100.0, queued_s=(at - NOW) * 200, bound=True)
        return Signals({"features": stage(3, fast), "encoder": stage(3, fast), "decoder": stage(3, slow)})

    _, decisions = follow(state, settings_, seen, 200)
    last = decisions[-1]
    assert sum(last.targets.values()) <= 10
    assert last.targets["decoder"] > last.targets["encoder"]
    assert {u.reason for u in last.units.values()} == {"gpu_budget"}


random_readings = st.builds(
    reading,
    at=st.floats(NOW - 10, NOW + 2),
    used=st.floats(0, 1),
    queued_s=st.floats(0, 1e5),
    bound=st.booleans(),
    rate=st.none() | st.floats(0.1, 1e4),
    sm_utilization=st.none() | st.floats(0, 1),
    gpu_share=st.none() | st.floats(0, 1),
    done_s=st.floats(0, 1e4),
    saturation=st.floats(0, 1),
)
random_stages = st.builds(
    lambda ready, pending, found: StageSignals(
        ready + pending, ready, pending, 1.0, dict(enumerate_named(found[:ready]))
    ),
    st.integers(0, 6),
    st.integers(0, 6),
    st.lists(random_readings, max_size=6),
)


def enumerate_named(found: list[ReplicaReading]) -> list[tuple[str, ReplicaReading]]:
    return [(str(i), one) for i, one in enumerate(found)]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(random_stages, random_stages, random_stages), min_size=1, max_size=12),
    topology=st.sampled_from(["colocated", "split"]),
    budget=st.none() | st.floats(3, 30),
)
def test_any_signals_give_targets_within_limits_and_a_replay_gives_the_same(
    steps: list[tuple[StageSignals, StageSignals, StageSignals]], topology: str, budget: float | None
) -> None:
    limits = Limits(min_replicas=1, max_replicas=7)
    settings_ = config(
        topology=topology, gpu_budget=budget, features=limits, encoder=limits, decoder=limits, pods=limits
    )
    state, log = State(), []
    for i, stages in enumerate(steps):
        state, decision = decide(settings_, state, Signals(dict(zip(STAGES, stages, strict=True))), NOW + i)
        log.append(decision)
        assert all(1 <= target <= 7 for target in decision.targets.values())
        assert all(unit.words for unit in decision.units.values())
    again = State()
    for i, (stages, decision) in enumerate(zip(steps, log, strict=True)):
        # As the mount keeps it: through JSON.
        again = State.from_dict(json.loads(json.dumps(again.to_dict())))
        again, replayed = decide(settings_, again, Signals(dict(zip(STAGES, stages, strict=True))), NOW + i)
        assert replayed == decision
    assert again == state


@given(count=st.integers(1, 50), demand=st.floats(0, 5000), queued=st.floats(0, 1e4))
def test_what_suffices_carries_the_demand(count: int, demand: float, queued: float) -> None:
    if suffices(count, rate=RATE, demand=demand, queued_s=queued, config=config()):
        assert count * RATE >= demand
        assert queued / (count * RATE) <= 2.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="stages are features"):
        decide(config(), State(), Signals({"vad": StageSignals(1, 1, 0)}), NOW)
    with pytest.raises(ValueError, match="none"):
        decide(config(), State(), Signals({}), NOW)
    with pytest.raises(ValidationError, match="above max_replicas"):
        Limits(min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError):
        ScalingSettings(sm_utilisation=0.5)  # type: ignore[call-arg]
