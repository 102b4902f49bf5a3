from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.batching.compare import (
    Candidate,
    ObjectiveOutOfReach,
    Run,
    adaptive,
    ceiling,
    compare,
    confirm,
    grid,
    run,
    sustained,
)
from loadtest.batching.engine import EngineMachine, measure
from loadtest.batching.machines import Costs, SimulatedMachine, between
from loadtest.batching.strategies import Fixed
from loadtest.batching.windows import LONGEST_S, MOST_TOKENS, SHORTEST_S, Window, percentile, poisson
from loadtest.gpu.batching import parse
from loadtest.gpu.work import random_weights
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.precision import Compute
from tests.loadtest.gpu_systems import SMALL

# large-v3 on an H100, measured
LARGE = Costs(
    {1: 0.0047, 8: 0.0352, 32: 0.1408},
    {1: 0.0018, 8: 0.0033, 32: 0.0048, 64: 0.0065, 128: 0.010, 256: 0.016},
    lag=1,
)


@given(st.floats(0.1, 500), st.integers(1, 500), st.integers(0, 5))
def test_windows_arrive_in_order_and_the_same_ones_at_every_rate(rate: float, count: int, seed: int) -> None:
    windows, faster = poisson(rate, count, seed), poisson(2 * rate, count, seed)
    assert all(a.arrived <= b.arrived for a, b in pairwise(windows))
    assert all(SHORTEST_S <= w.seconds <= LONGEST_S and 1 <= w.tokens <= MOST_TOKENS for w in windows)
    assert [(w.seconds, w.tokens) for w in windows] == [(w.seconds, w.tokens) for w in faster]
    assert [w.arrived for w in windows] == pytest.approx([2 * w.arrived for w in faster])


def test_the_traffic_is_as_it_says() -> None:
    windows = poisson(50, 20_000, seed=3)
    assert len(windows) / windows[-1].arrived == pytest.approx(50, rel=0.05)
    assert sum(w.tokens for w in windows) / sum(w.seconds for w in windows) == pytest.approx(128 / 30, rel=0.02)
    with pytest.raises(ValueError, match="a rate is above 0"):
        poisson(0, 10, seed=0)


def test_a_percentile_is_the_nearest_rank() -> None:
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99
    assert percentile([2.0], 0.5) == 2
    assert percentile([], 0.5) == math.inf


@given(st.integers(1, 256))
def test_costs_lie_between_those_measured(slots: int) -> None:
    assert 0.0018 <= between(LARGE.step, slots) <= 0.016
    assert LARGE.step_s(slots) <= LARGE.step_s(min(256, slots + 1))


def test_a_large_batch_is_encoded_in_parts() -> None:
    assert LARGE.encoding_s(33) == pytest.approx(0.1408 + 0.0047)
    with pytest.raises(ValueError, match="ascending"):
        Costs({2: 1.0, 1: 1.0}, {1: 1.0}, lag=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_a_simulated_window_leaves_after_its_tokens(tokens: list[int]) -> None:
    machine, alike = SimulatedMachine(LARGE), SimulatedMachine(LARGE)
    machine.encode(range(len(tokens)), tokens)
    alike.encode(range(len(tokens)), tokens)
    left: dict[int, int] = {}
    steps = 0
    while machine.active:
        steps += 1
        left |= dict.fromkeys(machine.step(), steps)
    assert [left[i] for i in range(len(tokens))] == [3 + count + LARGE.lag for count in tokens]
    alike.drain()
    assert alike.now() == pytest.approx(machine.now())


def test_a_fixed_batch_waits_and_ends_as_a_whole() -> None:
    windows = [Window(0.0, 10, 10), Window(0.1, 30, 100), Window(9.0, 1, 1)]
    machine = SimulatedMachine(LARGE)
    latencies = Fixed(size=2, wait_s=0.5).run(machine, windows, give_up_s=60)
    assert latencies[0] == pytest.approx(latencies[1] + 0.1)  # the short one waits for the other's begin and end
    assert latencies[2] == pytest.approx(0.5 + LARGE.encoding_s(1) + (3 + 1 + LARGE.lag) * LARGE.step_s(1))


def test_in_flight_a_short_window_does_not_wait_for_a_long_one() -> None:
    windows = [Window(0.0, 30, 200), Window(0.1, 1, 4)]
    latencies = adaptive(LARGE, 2.0, 16).run(SimulatedMachine(LARGE), windows, give_up_s=60)
    assert latencies[1] < 0.05 < latencies[0]


@pytest.mark.parametrize("strategy", [Fixed(16, 0.05), adaptive(LARGE, 2.0, 16)])
def test_an_overloaded_strategy_gives_up_in_the_end(strategy: Fixed) -> None:
    one = run(strategy, SimulatedMachine(LARGE), rate=1000, count=3000, objective_s=2.0, seed=1)
    assert one.p99_s == math.inf
    assert not one.held


def test_the_adaptive_way_sustains_more_than_the_best_of_the_grid() -> None:
    """The goal, by simulation with costs measured on an H100."""
    best = grid(LARGE, 2.0, sizes=(16, 32, 48, 64, 128))[0]
    ours = sustained(adaptive(LARGE, 2.0, 16), LARGE, 2.0)
    assert best.run.held
    assert ours.held
    assert ours.rate >= 1.41 * best.run.rate
    assert ours.rate < ceiling(LARGE)


def test_feedback_does_not_lower_what_is_sustained() -> None:
    for objective_s in (1.0, 2.0):
        still = sustained(adaptive(LARGE, objective_s, 16, feedback=False), LARGE, objective_s)
        moving = sustained(adaptive(LARGE, objective_s, 16), LARGE, objective_s)
        assert moving.rate >= 0.95 * still.rate


def test_candidates_close_in_on_their_limits() -> None:
    candidates = [Candidate(Fixed(32, 0.1), 60.0), Candidate(adaptive(LARGE, 2.0, 16), 60.0)]
    runs = list(confirm(candidates, SimulatedMachine(LARGE), 2.0, seconds=800, run_s=30))
    assert len(runs) > 10
    for candidate in candidates:
        assert candidate.best is not None
        assert candidate.best.rate < candidate.failed < 1.15 * candidate.best.rate


def test_a_load_held_above_one_that_was_not_does_not_count() -> None:
    candidate = Candidate(Fixed(1, 0.0), 10.0)
    assert candidate.next_rate == 10.0
    for rate, p99_s in ((10.0, 1.0), (12.0, 3.0), (13.0, 1.9)):
        candidate.runs.append(Run(rate, 100, 0.5, p99_s, 2.0))
    assert candidate.best is not None
    assert candidate.best.rate == 10.0
    assert candidate.next_rate == 11.0


@pytest.fixture(scope="module")
def machine() -> EngineMachine:
    compute = Compute.resolve("cpu", "float32")
    weights = random_weights(SMALL, compute.device, torch.float32)
    return EngineMachine(Checkpoint("random", SMALL, weights, None, source="random"), compute, slots=8, encoder_batch=2)


def test_a_real_window_leaves_after_its_tokens(machine: EngineMachine) -> None:
    machine.begin()
    tokens = [1, 7, 3]
    machine.encode([10, 11, 12], tokens)
    left: dict[int, int] = {}
    for step in range(1, 20):
        left |= dict.fromkeys(machine.step(), step)
        if step == 2:
            machine.encode([13], [2])  # into a slot in flight
    assert left == {10: 3 + 1, 11: 3 + 7, 12: 3 + 3, 13: 2 + 3 + 2}
    assert [count for count, _ in machine.encodings()] == [2, 1, 1]
    assert machine.active == 0


def test_the_whole_comparison_runs_on_a_real_engine(machine: EngineMachine) -> None:
    costs = measure(machine, (1, 2), (1, 4, 8), repeats=2, warm_up=2)
    assert all(seconds > 0 for curve in (costs.encoder, costs.step) for seconds in curve.values())
    said: list[str] = []
    result = compare(machine, costs, (120.0,), encoder_start=2, seconds=1, runs=2, say=said.append)
    assert [one["strategy"].split(",")[0] for one in result["real"]] == ["fixed", "adaptive"]
    assert all(one["runs"] for one in result["real"])
    assert len(result["simulated"][0]["fixed"]) == 20  # sizes up to the slots, and waits
    assert any("real time" in line for line in said)
    with pytest.raises(ObjectiveOutOfReach):
        compare(machine, costs, (1e-6,), encoder_start=2, seconds=1, runs=2, say=said.append)


def test_objectives_are_read() -> None:
    assert parse(["--objectives", "3,1.5"]).objectives == (3.0, 1.5)
    with pytest.raises(SystemExit):
        parse(["--objectives", "0"])
