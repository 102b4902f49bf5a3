"""How large a replica's batches may be and how long it waits to fill one, from what it sees of itself (pure).

Once a second a stage's observation goes in and a new state comes out. The budget **grows** where batches are full and
work waits while the device is under its utilization threshold, to where batches would take ``AIM`` of the latency
objective; and where a whole further batch waits, for then only throughput helps. It **shrinks** where batches take so
long that the objective is at risk, but only to where what is in use now would still fill no more than ``FULL`` of it: a
smaller budget that the load does not fit turns time in batches into time in the queue, and more of it. Where it cannot
grow within the objective or memory, ``State.at_bound`` says so: more replicas are the answer left.

Why it does not swing: a batch of a larger budget takes longer, but not by more than the budget grew (it costs something
fixed, and so much a unit). So a budget grows, for utilization's sake, to none that was given up for latency's; and one
that shrank has room for the load, so that no queue makes it grow again. Between ``AIM`` and ``AT_RISK`` nothing moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

AT_RISK = 0.9
"""From this share of the latency objective on it is at risk."""
AIM = 0.75
"""Where a budget moves, the share of the objective that its batches shall take."""
FULL = 0.8
"""Of the budget: batches below are bounded by what arrives, and a larger budget would change nothing. Above it there is
little room for more."""
SMALL = 0.5
"""Of the budget: batches below are small, and may be waited for."""
MOST_STEP = 2.0
"""A budget changes at most by this factor at a time."""
GROW_AFTER, SHRINK_AFTER = 3, 2
"""So many observations, one after the other, must ask for it."""
LEAST_WAIT_S = 0.001
MOST_WAIT = 0.1
"""Of the latency objective."""

STAGE_SHARES: Mapping[str, float] = {"features": 0.1, "encoder": 0.3, "decoder": 0.6}
"""Of the latency objective, which is of all stages together."""


class FeedbackSettings(BaseModel):
    """How batch sizes follow the load."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="off: every budget stays where its stage's settings put it, with no wait")
    utilization_threshold: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="below it, with work waiting, budgets grow; of SM utilization, on a CPU of the busy share",
    )
    latency_objective_s: float | None = Field(
        None, gt=0, description="of a window through all stages, 99 of 100; by default 20 s, on a GPU 2 s"
    )
    max_wait_s: float = Field(0.05, ge=0, description="longest that a window waits for others to fill its batch")

    def objective_s(self, stage: str, *, on_gpu: bool) -> float:
        """A stage's part of the latency objective. KeyError for a stage that there is not."""
        whole = self.latency_objective_s or (2.0 if on_gpu else 20.0)
        return STAGE_SHARES[stage] * whole


@dataclass(frozen=True, slots=True)
class Bounds:
    """What does not change while a replica lives. Budgets are in the stage's unit: features samples, encoder windows,
    decoder slots.

    most: what memory was planned for. quantum: the smallest change. objective_s: of the stage's latency. batches: how
    many a window may have to see through: 2 where one that runs ends before its own begins, 1 where windows enter
    in flight. most_wait_s: 0 where waiting for a fuller batch makes no sense.
    """

    least: float
    most: float
    quantum: float
    objective_s: float
    batches: int = 2
    most_wait_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.quantum <= self.least <= self.most:
            raise ValueError(f"bounds must be 0 < quantum <= least <= most, not {self}")
        if self.objective_s <= 0 or self.batches < 1 or self.most_wait_s < 0:
            raise ValueError(f"a latency objective and batches are above 0, a wait is not below: {self}")

    def nearest(self, budget: float) -> float:
        """The budget within the bounds that is next below, in whole quanta above ``least``."""
        quanta = math.floor((min(budget, self.most) - self.least) / self.quantum + 1e-9)
        return self.least + max(0, quanta) * self.quantum


@dataclass(frozen=True, slots=True)
class Observation:
    """A replica over its last seconds.

    utilization: of its device, 0 to 1, where 1 is its saturation (SM utilization, normalised; on a CPU busy share).
    waiting: cost of the windows that wait, in the budget's unit.
    fill: share of the budget that batches, or steps, used; 0 without any.
    load: the most that was in use in any second of the last minute, over all of that second, in the budget's unit.
    batch_s: how long batches, or windows in their slots, take, near the longest; None where none has run since the
        budget changed.
    latency_s: of windows in this stage, near the longest, or the oldest wait if that is longer; 0 without any.
    """

    utilization: float
    waiting: float
    fill: float
    load: float
    batch_s: float | None
    latency_s: float


@dataclass(frozen=True, slots=True)
class State:
    """budget, wait_s: what holds now. at_bound: the budget cannot grow, for memory's or for the objective's sake.
    asked: for how many observations growth (above 0) or shrinking (below 0) has been asked for. reason: in words, why
    the last change was made."""

    budget: float
    wait_s: float = 0.0
    at_bound: bool = False
    asked: int = 0
    reason: str = "as set"


def begin(bounds: Bounds, budget: float) -> State:
    start = bounds.nearest(budget)
    return State(start, at_bound=start >= bounds.nearest(bounds.most))


def adjust(state: State, seen: Observation, bounds: Bounds, *, threshold: float) -> State:
    """The state after one more observation. threshold: of utilization."""
    state = replace(state, wait_s=_wait(state, seen, bounds, threshold))
    if seen.batch_s is None:  # it is not known yet what the budget does
        return replace(state, asked=0)
    passing = bounds.batches * seen.batch_s  # of a window's latency, what lies in batches
    larger, smaller = _larger(state.budget, passing, bounds), _smaller(state.budget, passing, seen, bounds)
    state = replace(state, at_bound=larger <= state.budget)
    if smaller < state.budget:
        asked = min(state.asked, 0) - 1
        if asked > -SHRINK_AFTER:
            return replace(state, asked=asked)
        taken = f"batches take {passing:.2f} s of an objective of {bounds.objective_s:.2f} s"
        return replace(state, budget=smaller, asked=0, at_bound=True, reason=f"smaller: {taken}")
    if seen.fill >= FULL and seen.waiting > state.budget:
        larger, why = bounds.nearest(state.budget * MOST_STEP), "more than another batch waits"
    elif seen.fill >= FULL and seen.waiting > 0 and seen.utilization < threshold:
        why = f"utilization {seen.utilization:.2f} is under {threshold:.2f} while work waits"
    else:
        return replace(state, asked=0)
    if larger <= state.budget:
        return replace(state, asked=0)
    asked = max(state.asked, 0) + 1
    if asked < GROW_AFTER:
        return replace(state, asked=asked)
    return replace(state, budget=larger, asked=0, reason=f"larger: {why}")


def _larger(budget: float, passing: float, bounds: Bounds) -> float:
    """What the budget may grow to: where batches take ``AIM`` of the objective, at most."""
    aim = AIM * bounds.objective_s
    factor = MOST_STEP if passing * MOST_STEP <= aim else aim / passing
    return max(budget, bounds.nearest(budget * factor))


def _smaller(budget: float, passing: float, seen: Observation, bounds: Bounds) -> float:
    """What the budget shall shrink to: where batches take ``AIM`` of the objective, if the load fits there."""
    if passing <= AT_RISK * bounds.objective_s:
        return budget
    least = seen.load / FULL
    aim = budget * max(1 / MOST_STEP, AIM * bounds.objective_s / passing)
    if least >= aim:
        aim = least + bounds.quantum  # budgets are rounded down
    # less than that is not worth a change, and smaller batches lower the load: budgets would creep
    return bounds.nearest(aim) if aim <= budget * AIM / AT_RISK else budget


def _wait(state: State, seen: Observation, bounds: Bounds, threshold: float) -> float:
    """How long to wait for a fuller batch: longer while small batches keep the device busy and latency is far from the
    objective, shorter where the device has time to spare or latency is at risk. Between the two lies more than one
    change moves: half of the threshold, and, as the wait stays within ``MOST_WAIT`` of the objective, its latency."""
    objective = bounds.objective_s
    if seen.latency_s > AT_RISK * objective or seen.utilization < threshold / 2:
        return state.wait_s / 2 if state.wait_s > LEAST_WAIT_S else 0.0
    small = 0 < seen.fill < SMALL and seen.utilization >= threshold
    if small and seen.batch_s is not None and seen.latency_s <= AIM * objective:
        return min(bounds.most_wait_s, MOST_WAIT * objective, state.wait_s + seen.batch_s / 4)
    return state.wait_s
