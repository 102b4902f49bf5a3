from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.simulate import compare, policies
from loadtest.simulate.__main__ import missed, parse
from loadtest.simulate.play import _waits, play
from loadtest.simulate.policies import Hpa, Ours
from loadtest.simulate.scenarios import TRACES, Trace, arrivals, clairvoyant, trace
from loadtest.simulate.world import EPOCH, World
from serve_app.scaling.policy import State, decide_from


def short(name: str, seconds: int, start: int = 0) -> Trace:
    whole = trace(name)
    part = slice(start, start + seconds)
    return replace(whole, expected=whole.expected[part], missing=whole.missing[part])


@settings(max_examples=40, deadline=None)
@given(levels=st.lists(st.integers(0, 4), min_size=1, max_size=12), cold=st.integers(1, 4))
def test_the_clairvoyant_optimum_is_the_cheapest_of_all_schedules(levels: list[int], cold: int) -> None:
    """By dynamic programming over the counts: ready in each second; going up pays the cold start."""
    intensity = np.array(levels, dtype=float)
    _, cost = clairvoyant(intensity, 1.0, float(cold), least=0)
    best = {levels[0]: float(levels[0])}
    for level in levels[1:]:
        best = {
            n: n + min(paid + cold * max(0, n - before) for before, paid in best.items())
            for n in range(5)
            if n >= level
        }
    assert cost == pytest.approx(min(best.values()))


def test_recordings_come_in_several_windows() -> None:
    windows = arrivals(np.full(200_000, 40.0), np.random.default_rng(0))
    assert windows.mean() == pytest.approx(40, rel=0.01)
    assert windows.var() == pytest.approx(7 * 40, rel=0.05)


def test_waits_are_first_come_first_served() -> None:
    # Ten windows come at once; two are done a second.
    waits = _waits(np.array([10.0, 0, 0, 0, 0]), np.array([2.0, 2, 2, 2, 2]))
    assert waits[:4] == pytest.approx([0.5, 1.5, 2.5, 3.5])
    assert _waits(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == pytest.approx(np.zeros(8))
    # Nothing is done for three seconds, then all at once.
    assert _waits(np.array([4.0, 0, 0, 0]), np.array([0.0, 0, 0, 4.0]))[:4].min() > 2


@pytest.mark.parametrize("topology", ["colocated", "split"])
def test_no_window_is_lost_and_replicas_that_die_come_again(topology: str) -> None:
    made = replace(short("dying_nodes", 900), life_s=300.0, mass_death=(100, 0.5))
    world = World(made, gpus=10, cold_start_s=20, topology=topology)
    start = {unit: fleet.target for unit, fleet in world.units.items()}
    for _ in range(900):
        world.second()
        assert world.done.sum() <= world.arrived[: world.now + 1].sum() + 1e-6
    assert {unit: fleet.ready + fleet.pending for unit, fleet in world.units.items()} == start
    assert world.done.sum() + world.waiting() - world._owed == pytest.approx(world.arrived.sum())


def test_an_overloaded_pod_works_all_the_time_and_does_what_the_benchmarks_say() -> None:
    overload = replace(short("constant", 300), expected=np.full(300, 1.2))
    world = World(overload, gpus=10, cold_start_s=30)
    world.units["pods"].ready = world.units["pods"].target = 10
    for _ in range(300):
        world.second()
    assert world.pod_utilization() == pytest.approx(1, rel=0.02)
    # Features are made for what cannot be decoded yet, too.
    assert world.done[100:].mean() / 10 == pytest.approx(world.work.rate, rel=0.015)


@pytest.mark.parametrize("topology", ["colocated", "split"])
def test_sums_say_what_each_replicas_readings_say(topology: str) -> None:
    """The policy decides the same from the short way that large fleets take."""
    decided = []
    for each in (True, False):
        world = World(short("step", 400, 1700), gpus=6, cold_start_s=30, topology=topology)
        policy = Ours(policies.settings(world, 6), each_reading=each)
        result, course = play(world, policy)
        decided.append([course.targets[unit].tolist() for unit in sorted(course.targets)])
        assert result.events
    assert decided[0] == decided[1]


def test_a_recorded_run_replays() -> None:
    world = World(short("step", 300, 1700), gpus=20, cold_start_s=30)
    config = policies.settings(world, 20)
    policy, seen, log = Ours(config), [], []
    for _ in range(300):
        world.second()
        loads = world.loads()
        seen.append(loads)
        policy.state, decision = decide_from(config, policy.state, *loads, EPOCH + world.now)
        log.append(decision)
        world.scale({unit: one.target for unit, one in decision.units.items()})
    state = State()
    for second, (loads, decision) in enumerate(zip(seen, log, strict=True)):
        state, again = decide_from(config, State.from_dict(state.to_dict()), *loads, EPOCH + second)
        assert again == decision


@pytest.mark.parametrize("gpus", [10.0, 10_000.0])
def test_a_constant_load_does_not_make_it_flap(gpus: float) -> None:
    world = World(trace("constant"), gpus=gpus, cold_start_s=30)
    result, _ = play(world, Ours(policies.settings(world, gpus)))
    assert result.late_events == 0
    assert result.late_share < 0.01


def test_a_step_is_answered_in_three_seconds_and_settles_in_two_cold_starts() -> None:
    made = replace(short("step", 600, 1500), step_at=300)
    world = World(made, gpus=100, cold_start_s=60)
    result, _ = play(world, Ours(policies.settings(world, 100)))
    assert result.first_order_s <= 3
    assert result.settle_s <= 120
    assert result.unsafe == 0


def test_lost_signals_never_scale_down() -> None:
    made = replace(short("lost_signals", 900), missing=np.where(np.arange(900) < 300, 0.0, 1.0))
    world = World(made, gpus=100, cold_start_s=30)
    _, course = play(world, Ours(policies.settings(world, 100)))
    assert np.all(np.diff(course.targets["pods"][301:]) == 0)


def test_a_usual_policy_follows_a_step_too() -> None:
    world = World(short("step", 900, 1500), gpus=100, cold_start_s=30)
    result, course = play(world, Hpa("utilization", 0.7, 300))
    assert course.targets["pods"][-1] * 0.95 >= 80 / 0.77
    assert result.late_share > 0


def test_a_front_has_nothing_that_another_beats() -> None:
    points = [
        {"cost": c, "late_share": late} for c, late in [(1.0, 0.5), (1.2, 0.6), (1.3, 0.1), (1.3, 0.2), (2.0, 0.1)]
    ]
    assert [(p["cost"], p["late_share"]) for p in compare.front(points)] == [(1.0, 0.5), (1.3, 0.1)]
    assert compare.late_at(points, 1.25) == 0.5
    assert math.isinf(compare.late_at(points, 0.9))


def test_each_goal_can_be_missed() -> None:
    fine = {"trace": "bursts", "late_events": 0, "settle_s": None, "cold_start_s": 30, "unsafe": 0}
    fine |= {"late_share": 0.0, "cost": 1.0}
    assert missed(fine) == []
    assert missed({**fine, "late_share": 0.02})
    assert missed({**fine, "cost": 1.3})
    assert missed({**fine, "unsafe": 1})
    assert missed({**fine, "trace": "step", "settle_s": 61})
    assert missed({**fine, "trace": "constant", "late_events": 1})


def test_every_trace_is_made_and_others_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TRACES:
        made = trace(name)
        assert made.seconds == len(made.missing) >= 3600
        assert made.expected.min() > 0
        assert np.array_equal(made.expected, trace(name).expected)
    with pytest.raises(ValueError, match="no trace"):
        trace("holiday")
    with pytest.raises(SystemExit):
        parse(["goals", "--cold", "0"])
    assert "above 0" in capsys.readouterr().err
