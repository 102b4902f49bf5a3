"""One trace against one policy, and what came of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loadtest.simulate.policies import Ours, Policy
from loadtest.simulate.scenarios import LATE_SHARE, OBJECTIVE_S, Array, clairvoyant, safe_counts
from loadtest.simulate.world import World

PARTS = 4
"""Points in each second at which waits are taken."""


@dataclass(slots=True)
class Event:
    """A change of a unit's target. second: of the trace."""

    second: int
    unit: str
    before: int
    after: int
    reason: str = ""


@dataclass(slots=True)
class Result:
    """late_share: of the windows. gpu_hours and optimum_gpu_hours: of the policy, of the clairvoyant optimum. flaps:
    changes of a target in the other direction than the one before, within a cold start, or a minute where that is
    longer. unsafe: decisions to scale down below the safe count. settle_s: from the step until the minute that follows
    keeps the objective (nan where the trace has no step). late_events: scale events in the last 80 % of the trace.
    """

    late_share: float
    p99_wait_s: float
    gpu_hours: float
    optimum_gpu_hours: float
    events: list[Event]
    late_events: int
    flaps: int
    unsafe: int
    settle_s: float
    first_order_s: float
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return self.gpu_hours / self.optimum_gpu_hours

    def summary(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key != "events"}
        values["settle_s"] = None if np.isnan(self.settle_s) else self.settle_s
        values["first_order_s"] = None if np.isnan(self.first_order_s) else self.first_order_s
        return {**values, "cost": self.cost, "scale_events": len(self.events)}


@dataclass(slots=True)
class Course:
    """Second by second: the targets and the ready replicas by unit, and each second's mean wait."""

    targets: dict[str, Array]
    ready: dict[str, Array]
    waits: Array


def play(world: World, policy: Policy) -> tuple[Result, Course]:
    seconds = world.trace.seconds
    targets = {unit: np.zeros(seconds) for unit in world.units}
    ready = {unit: np.zeros(seconds) for unit in world.units}
    safe = {unit: safe_counts(world.intensity, rate) for unit, rate in world.rates().items()}
    events: list[Event] = []
    reasons: Counter[str] = Counter()
    unsafe = 0
    for second in range(seconds):
        world.second()
        wanted = policy.step(world) or {}
        for unit, fleet in world.units.items():
            target = wanted.get(unit, fleet.target)
            if target == fleet.target:
                continue
            reason = policy.last.units[unit].reason if isinstance(policy, Ours) and policy.last else ""
            reasons[reason] += 1
            events.append(Event(second, unit, fleet.target, target, reason))
            unsafe += int(target < fleet.target and target < safe[unit][second])
        world.scale(wanted)
        for unit, fleet in world.units.items():
            targets[unit][second], ready[unit][second] = fleet.target, fleet.ready
    waits = _waits(world.arrived, world.done)
    optimum = {
        unit: clairvoyant(world.intensity, rate, world.cold_start_s)[1] * world.gpus_held(unit)
        for unit, rate in world.rates().items()
    }
    held = {unit: float(counts.sum()) * world.gpus_held(unit) for unit, counts in targets.items()}
    weights = np.repeat(world.arrived / PARTS, PARTS)
    result = Result(
        late_share=float(weights[waits > OBJECTIVE_S].sum() / max(weights.sum(), 1)),
        p99_wait_s=_quantile(waits, weights, 1 - LATE_SHARE),
        gpu_hours=sum(held.values()) / 3600,
        optimum_gpu_hours=sum(optimum.values()) / 3600,
        events=events,
        late_events=sum(event.second >= 0.2 * seconds for event in events),
        flaps=_flaps(events, max(60.0, world.cold_start_s)),
        unsafe=unsafe,
        settle_s=_settle(waits, weights, world.trace.step_at),
        first_order_s=_first_order(events, world.trace.step_at),
        reasons=dict(reasons),
    )
    return result, Course(targets, ready, waits.reshape(-1, PARTS).mean(axis=1))


def _waits(arrived: Array, done: Array) -> Array:
    """Of ``PARTS`` points in each second: first come, first served, from what had come and what was done by then.

    What has not been done by the end counts as if it were done just then."""
    came = np.concatenate([[0.0], np.cumsum(arrived)])
    out = np.concatenate([[0.0], np.cumsum(done)])
    out[-1] = max(out[-1], came[-1])
    points = (np.arange(PARTS) + 0.5) / PARTS
    seconds = np.arange(len(arrived))[:, None] + points
    place = came[:-1, None] + arrived[:, None] * points
    # A flat stretch of ``out`` ends where the next window leaves.
    rising = np.concatenate([[True], np.diff(out) > 0])
    finished = np.interp(place, out[rising], np.arange(len(out))[rising])
    after_gap = np.searchsorted(out[rising], place, side="left")
    starts = np.arange(len(out))[rising][after_gap] - 1.0
    waits: Array = np.maximum(0.0, np.maximum(finished, starts) - seconds).reshape(-1)
    return waits


def _quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    summed = np.cumsum(weights[order])
    if summed[-1] <= 0:
        return 0.0
    return float(values[order][np.searchsorted(summed, share * summed[-1])])


def _flaps(events: list[Event], within_s: float) -> int:
    flaps = 0
    last: dict[str, Event] = {}
    for event in events:
        before = last.get(event.unit)
        if before is not None and event.second - before.second <= within_s:
            flaps += (event.after > event.before) != (before.after > before.before)
        last[event.unit] = event
    return flaps


def _settle(waits: Array, weights: Array, step_at: int | None) -> float:
    """Seconds from the step until a minute follows in which at most 1 % is late."""
    if step_at is None:
        return float("nan")
    minute = 60 * PARTS
    settled = step_at * PARTS
    while settled < len(waits):
        next_s, late = slice(settled, settled + minute), waits[settled : settled + minute] > OBJECTIVE_S
        if weights[next_s][late].sum() <= LATE_SHARE * weights[next_s].sum():
            break
        settled += int(np.flatnonzero(late)[-1]) + 1
    return settled / PARTS - step_at


def _first_order(events: list[Event], step_at: int | None) -> float:
    """Seconds from the step's beginning to the first order after it."""
    if step_at is None:
        return float("nan")
    return next(
        (float(e.second + 1 - step_at) for e in events if e.second >= step_at and e.after > e.before), float("nan")
    )
