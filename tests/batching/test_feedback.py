from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.batching.budget import AdaptiveBudget, near_longest
from serve_app.batching.feedback import (
    AT_RISK,
    MOST_STEP,
    MOST_WAIT,
    Bounds,
    FeedbackSettings,
    Observation,
    State,
    adjust,
    begin,
)

THRESHOLD = 0.75
SECONDS = 60


@st.composite
def bounds_of(draw: st.DrawFn) -> Bounds:
    quantum = draw(st.sampled_from([1.0, 4.0, 1000.0]))
    least = quantum * draw(st.integers(1, 4))
    return Bounds(
        least=least,
        most=least + quantum * draw(st.integers(0, 300)),
        quantum=quantum,
        objective_s=draw(st.floats(0.05, 60)),
        batches=draw(st.sampled_from([1, 2])),
        most_wait_s=draw(st.sampled_from([0.0, 0.05, 1.0])),
    )


SHARES = st.floats(0, 1)
SECONDS_SEEN = st.floats(0, 100)
OBSERVATIONS = st.builds(
    Observation,
    utilization=SHARES,
    waiting=st.floats(0, 1e6),
    fill=SHARES,
    load=st.floats(0, 300),
    batch_s=st.none() | SECONDS_SEEN,
    latency_s=SECONDS_SEEN,
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Bounds, State]:
    """A stage after some observations of any kind."""
    bounds = draw(bounds_of())
    state = begin(bounds, draw(st.floats(0, 1e6)))
    for seen in draw(st.lists(OBSERVATIONS, max_size=6)):
        state = adjust(state, seen, bounds, threshold=THRESHOLD)
    return bounds, state


@given(situations(), OBSERVATIONS)
def test_budget_and_wait_stay_within_their_bounds(situation: tuple[Bounds, State], seen: Observation) -> None:
    bounds, state = situation
    after = adjust(state, seen, bounds, threshold=THRESHOLD)
    assert bounds.least <= after.budget <= bounds.most
    assert math.isclose((after.budget - bounds.least) % bounds.quantum, 0, abs_tol=1e-6)
    assert 0 <= after.wait_s <= min(bounds.most_wait_s, MOST_WAIT * bounds.objective_s) + 1e-9
    quantum = bounds.quantum  # to which budgets are rounded
    assert state.budget / MOST_STEP - quantum <= after.budget <= max(bounds.least, state.budget * MOST_STEP)


@given(situations(), OBSERVATIONS, SHARES, SECONDS_SEEN)
def test_a_busier_device_or_longer_batches_never_make_a_larger_budget(
    situation: tuple[Bounds, State], seen: Observation, utilization: float, batch_s: float
) -> None:
    bounds, state = situation
    seen = replace(seen, batch_s=seen.batch_s or 0.0)
    assert seen.batch_s is not None
    worse = replace(seen, utilization=max(seen.utilization, utilization), batch_s=max(seen.batch_s, batch_s))
    calm = adjust(state, seen, bounds, threshold=THRESHOLD).budget
    assert adjust(state, worse, bounds, threshold=THRESHOLD).budget <= calm


@given(situations(), OBSERVATIONS)
def test_nothing_changes_without_a_reason(situation: tuple[Bounds, State], seen: Observation) -> None:
    bounds, state = situation
    after = adjust(state, seen, bounds, threshold=THRESHOLD)
    if after.budget > state.budget:
        assert seen.waiting > 0
        assert seen.utilization < THRESHOLD or seen.waiting > state.budget
    if after.budget < state.budget:
        assert after.budget >= seen.load  # what is in use still fits
        assert seen.batch_s is not None
        assert bounds.batches * seen.batch_s > AT_RISK * bounds.objective_s
    assert after.budget == state.budget or after.reason != "as set"


@given(situations(), OBSERVATIONS)
def test_at_its_bound_a_budget_grows_for_a_whole_waiting_batch_alone(
    situation: tuple[Bounds, State], seen: Observation
) -> None:
    bounds, state = situation
    for _ in range(10):
        before, state = state, adjust(state, seen, bounds, threshold=THRESHOLD)
        if before.at_bound and state.at_bound and seen.waiting <= before.budget:
            assert state.budget <= before.budget


def asking(batch_s: float) -> Observation:
    return Observation(utilization=0.5, waiting=3.0, fill=1.0, load=1.0, batch_s=batch_s, latency_s=0.1)


ENCODER = Bounds(least=1, most=64, quantum=1, objective_s=1.0)


def test_one_odd_second_moves_nothing() -> None:
    state = begin(ENCODER, 8)
    for batch_s in (0.1, 0.1, 0.45, 0.1, 0.1, 0.5, 0.4, 0.5, 0.4):
        state = adjust(state, asking(batch_s), ENCODER, threshold=THRESHOLD)
    assert state.budget == 8


def test_a_budget_grows_under_the_threshold_and_says_why() -> None:
    state = begin(ENCODER, 8)
    for _ in range(3):
        assert state.budget == 8
        state = adjust(state, asking(0.1), ENCODER, threshold=THRESHOLD)
    assert state.budget == 16
    assert state.reason == "larger: utilization 0.50 is under 0.75 while work waits"
    assert not state.at_bound


def test_at_its_largest_and_where_the_objective_holds_it_a_budget_is_at_its_bound() -> None:
    assert begin(ENCODER, 1000) == State(64, at_bound=True)
    held = adjust(begin(ENCODER, 8), asking(0.4), ENCODER, threshold=THRESHOLD)
    assert held == State(8, at_bound=True)


def test_long_batches_shrink_a_budget_as_far_as_the_load_fits() -> None:
    long = replace(asking(0.6), utilization=0.6, waiting=0.0, fill=0.4)
    for load, budget in ((1.0, 5), (4.4, 6), (7.0, 8)):  # 5 = 8 × 0.75 / 1.2
        state = begin(ENCODER, 8)
        for _ in range(2):
            state = adjust(state, replace(long, load=load), ENCODER, threshold=THRESHOLD)
        assert state.budget == budget
        assert state.at_bound
    assert adjust(begin(ENCODER, 8), long, ENCODER, threshold=THRESHOLD).reason == "as set"


def test_a_queue_of_a_whole_batch_makes_a_budget_grow_whatever_the_latency() -> None:
    state = begin(ENCODER, 8)
    queue = Observation(utilization=1.0, waiting=8.0, fill=1.0, load=7.5, batch_s=0.4, latency_s=30.0)
    for _ in range(10):
        state = adjust(state, queue, ENCODER, threshold=THRESHOLD)
    assert state.budget == 8
    for _ in range(3):
        state = adjust(state, replace(queue, waiting=9.0), ENCODER, threshold=THRESHOLD)
    assert state.budget == 16
    assert state.reason == "larger: more than another batch waits"


def test_impossible_bounds_are_refused() -> None:
    for wrong in (
        {"least": 0.0},
        {"most": 0.5},
        {"quantum": 2.0},
        {"objective_s": 0.0},
        {"batches": 0},
        {"most_wait_s": -1.0},
    ):
        with pytest.raises(ValueError, match=r"bounds must be|are above 0"):
            replace(ENCODER, **wrong)


def test_the_latency_objective_is_shared_out() -> None:
    defaults = FeedbackSettings()
    shares = [defaults.objective_s(stage, on_gpu=True) for stage in ("features", "encoder", "decoder")]
    assert sum(shares) == pytest.approx(2.0)
    assert FeedbackSettings(latency_objective_s=10).objective_s("encoder", on_gpu=False) == pytest.approx(3.0)
    with pytest.raises(ValidationError):
        FeedbackSettings(utilization_threshold=75)


class Stage:
    """A stage in virtual time, one window of cost 1 after the other: a batch takes ``fixed + each × windows`` seconds,
    with noise of some relative width; windows come at a rate, evenly or as a Poisson process; they gather while a batch
    runs."""

    def __init__(self, bounds: Bounds, start: float, fixed: float, each: float, *, noise: float = 0.0, seed: int = 0):
        self.fixed, self.each, self.noise = fixed, each, noise
        self.budget = AdaptiveBudget(FeedbackSettings(), bounds, start=start, now=0.0)
        self.rng = np.random.default_rng(seed)
        self.now, self.next = 0.0, 0.0
        self.waiting: list[float] = []

    def _arrive(self, rate: float, poisson: bool) -> None:
        while self.next <= self.now:
            self.waiting.append(self.next)
            self.next += self.rng.exponential(1 / rate) if poisson else 1 / rate

    def run(self, rate: float, seconds: float, *, poisson: bool = False) -> list[tuple[float, float]]:
        """Budget and wait after each second."""
        history: list[tuple[float, float]] = []
        self.next, end = max(self.next, self.now), self.now + seconds
        del self.waiting[1000:]  # as if the others were refused
        while self.now < end:
            self._arrive(rate, poisson)
            if not self.waiting:
                self.now = self.next
            elif self.now < (leaves_at := self.budget.leaves_at([1.0] * len(self.waiting), self.waiting[0])):
                self.now = min(self.next, leaves_at)
            else:
                size = min(len(self.waiting), int(self.budget.budget))
                batch, self.waiting = self.waiting[:size], self.waiting[size:]
                took = (self.fixed + self.each * size) * max(0.1, 1 + self.noise * float(self.rng.normal()))
                began, self.now = self.now, self.now + took
                self._arrive(rate, poisson)
                self.budget.ran(size, took)
                for arrived in batch:
                    self.budget.ended(arrived=arrived, began=began, at=self.now)
            oldest = self.waiting[0] if self.waiting else self.now
            self.budget.observe(self.now, waiting=[1.0] * len(self.waiting), oldest=oldest)
            history += [(self.budget.budget, self.budget.wait_s)] * (int(self.now) - len(history))
            del self.waiting[2000:]
        return history


def changes(history: list[tuple[float, float]]) -> int:
    return sum(one != other for one, other in pairwise(history))


LOADS = st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.2, 3.0])


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 0.3), st.floats(0.001, 0.2), LOADS, st.integers(1, 64), st.sampled_from([0.5, 2.0, 10.0]))
def test_a_steady_stage_settles(fixed: float, each: float, load: float, start: int, objective_s: float) -> None:
    """Whatever batches cost, and below as above what the stage can do."""
    bounds = Bounds(least=1, most=64, quantum=1, objective_s=objective_s, most_wait_s=0.05)
    stage = Stage(bounds, start, fixed, each)
    rate = load * 64 / (fixed + 64 * each)
    stage.run(rate, 300)
    assert changes(stage.run(rate, SECONDS)) <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("load", [0.3, 0.8, 1.5])
def test_a_noisy_stage_settles(load: float, seed: int) -> None:
    bounds = Bounds(least=1, most=64, quantum=1, objective_s=1.0)
    stage = Stage(bounds, 16, 0.1, 0.01, noise=0.1, seed=seed)
    rate = load * 25 / 0.35
    stage.run(rate, 300, poisson=True)
    assert changes(stage.run(rate, SECONDS, poisson=True)) <= 1


@settings(deadline=None, max_examples=15)
@given(st.floats(0.01, 0.2), st.floats(0.001, 0.02), st.integers(1, 64), st.sampled_from([0.2, 0.5, 0.8]))
def test_what_a_stage_can_do_at_its_largest_budget_it_does_at_the_one_it_settles_at(
    fixed: float, each: float, start: int, load: float
) -> None:
    """However tight the objective is: a budget never shrinks into a queue that grows."""
    bounds = Bounds(least=1, most=64, quantum=1, objective_s=0.5)
    stage = Stage(bounds, start, fixed, each)
    stage.run(load * 64 / (fixed + 64 * each), 240)
    assert len(stage.waiting) <= max(64, 2 * stage.budget.budget)


def test_overload_takes_the_largest_budget_and_asks_for_replicas() -> None:
    stage = Stage(Bounds(least=1, most=64, quantum=1, objective_s=1.0), 2, fixed=0.1, each=0.01)
    stage.run(2 * 64 / 0.74, 60)
    assert (stage.budget.budget, stage.budget.at_bound) == (64, True)


def test_a_burst_makes_larger_batches_and_the_quiet_after_it_does_no_harm() -> None:
    stage = Stage(Bounds(least=1, most=64, quantum=1, objective_s=2.0), 4, fixed=0.1, each=0.005)
    assert stage.run(20, 30)[-1][0] == 4
    burst = stage.run(100, 60)
    assert burst[-1][0] >= 20  # 4 windows in 0.12 s are 33 a second, 20 in 0.2 s 100
    assert len(stage.waiting) < 200
    quiet = stage.run(20, 30)
    assert changes(quiet[5:]) == 0


def test_small_batches_that_keep_a_device_busy_are_waited_for() -> None:
    bounds = Bounds(least=1, most=64, quantum=1, objective_s=2.0, most_wait_s=0.2)
    busy = Stage(bounds, 64, fixed=0.08, each=0.0005)
    history = busy.run(15, 60)  # a batch of its own for each window would take longer than there is time
    assert history[-1][1] > 0.08
    assert changes(history[-20:]) == 0
    quiet = busy.run(1, 30)
    assert quiet[-1][1] == 0


def test_with_feedback_off_budgets_stay() -> None:
    budget = AdaptiveBudget(FeedbackSettings(enabled=False), ENCODER, start=8, now=0.0)
    for second in range(1, 20):
        budget.ran(8, 0.9)
        budget.ended(arrived=second - 1.0, began=second - 0.9, at=second)
        assert not budget.observe(float(second), waiting=[1.0] * 50, oldest=0.0)
    assert (budget.budget, budget.wait_s) == (8, 0.0)


def test_windows_that_began_under_another_budget_say_nothing_of_this_one() -> None:
    budget = AdaptiveBudget(FeedbackSettings(), ENCODER, start=8, now=0.0)

    def second(now: float, began: float) -> bool:
        budget.ran(3, 0.9)
        budget.ended(arrived=began, began=began, at=now)
        return budget.observe(now, waiting=[1.0], oldest=now)

    assert not second(1.0, began=0.1)
    assert second(2.0, began=1.1)
    shrunk = budget.budget
    assert shrunk < 8
    for now in (3.0, 4.0, 5.0):
        assert not second(now, began=1.5)
    assert budget.budget == shrunk


def test_the_near_longest_is_one_of_them() -> None:
    assert near_longest([]) is None
    assert near_longest([3.0, 1.0]) == 3.0
    assert near_longest([float(i) for i in range(100)]) == 94.0
