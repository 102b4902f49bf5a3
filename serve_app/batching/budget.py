"""A replica's budget and batch wait as they follow its load: measures, and lets ``batching.feedback`` decide."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.batching.feedback import Bounds, FeedbackSettings, Observation, adjust, begin

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
SPAN_S = 10.0
"""Windows that ended so long ago count."""
LOADS_S = 60.0
"""So long a second is remembered by the load in it."""
NEAR_LONGEST = 0.95
"""The quantile that stands for the long ones: one window in twenty is no trend."""


@dataclass(frozen=True, slots=True)
class _Ended:
    at: float
    began: float
    latency_s: float

    @property
    def took_s(self) -> float:
        return self.at - self.began


class AdaptiveBudget:
    """Fed by the replica that owns it, from one thread. Times are seconds of one clock, which the caller chooses.

    ``budget`` and ``wait_s`` are what holds now; ``at_bound`` and ``reason`` are for the autoscaling policy and for
    people.
    """

    def __init__(self, settings: FeedbackSettings, bounds: Bounds, *, start: float, now: float):
        self.settings, self.bounds = settings, bounds
        self.state = begin(bounds, start)
        self._changed = self._observed = now
        self._busy_s = 0.0
        self._cost_s = 0.0  # each of these seconds by the cost in work
        self._loads: deque[tuple[float, float]] = deque()  # when, and how much was in use
        self._ended: deque[_Ended] = deque()

    @property
    def budget(self) -> float:
        return self.state.budget

    @property
    def wait_s(self) -> float:
        return self.state.wait_s

    @property
    def at_bound(self) -> bool:
        return self.state.at_bound

    def ran(self, cost: float, seconds: float) -> None:
        """A batch, or a step of the slots, ran: its cost in the budget's unit, and how long it took."""
        self._busy_s += seconds
        self._cost_s += seconds * cost

    def ended(self, *, arrived: float, began: float, at: float) -> None:
        """A window ended: when it came to the replica, when its batch began or it entered its slot, and now."""
        self._ended.append(_Ended(at, began, at - arrived))

    def batch(self, cost: float, arrived: Iterable[float], *, began: float, seconds: float) -> None:
        """A batch ran from its begin to its end: its cost, when its windows came, and how long it took."""
        self.ran(cost, seconds)
        for each in arrived:
            self.ended(arrived=each, began=began, at=began + seconds)

    def is_due(self, now: float) -> bool:
        """Has a second passed since it last observed?"""
        return now - self._observed >= PERIOD_S

    def leaves_at(self, costs: Iterable[float], oldest: float) -> float:
        """When a batch of what waits, the oldest of which arrived at ``oldest``, shall leave: then already where it is
        full, else when that has waited long enough."""
        return oldest if sum(costs) >= self.state.budget else oldest + self.state.wait_s

    def observe(self, now: float, *, waiting: Iterable[float], oldest: float, utilization: float | None = None) -> bool:
        """Adjusts, if a second has passed since it last did; says whether budget or wait have changed.

        waiting: costs of the windows that wait; oldest: when the first of them arrived (``now`` where none waits).
        utilization: of the device, 0 to 1 (``feedback.Observation``); by default this replica's busy share.
        """
        span, waiting = now - self._observed, list(waiting)
        if not self.is_due(now) or (waiting and not self._busy_s):  # a batch longer than that shall have ended
            return False
        while self._ended and self._ended[0].at < now - SPAN_S:
            self._ended.popleft()
        busy = min(1.0, self._busy_s / span)
        self._loads.append((now, self._cost_s / span))
        while self._loads[0][0] < now - LOADS_S:
            self._loads.popleft()
        seen = Observation(
            utilization=busy if utilization is None else utilization,
            waiting=sum(waiting),
            fill=min(1.0, self._cost_s / self._busy_s / self.state.budget) if self._busy_s else 0.0,
            load=max(load for _, load in self._loads),
            batch_s=near_longest([e.took_s for e in self._ended if e.began >= self._changed]),
            latency_s=max(near_longest([e.latency_s for e in self._ended]) or 0.0, now - oldest),
        )
        self._observed, self._busy_s, self._cost_s = now, 0.0, 0.0
        if not self.settings.enabled:
            return False
        before, threshold = self.state, self.settings.utilization_threshold
        self.state = adjust(before, seen, self.bounds, threshold=threshold)
        if self.state.budget != before.budget:
            self._changed = now
            logger.info("batch budget %g → %g, %s", before.budget, self.state.budget, self.state.reason)
        return (self.state.budget, self.state.wait_s) != (before.budget, before.wait_s)


def near_longest(values: list[float]) -> float | None:
    """The nearest-rank quantile ``NEAR_LONGEST``; None of none."""
    return sorted(values)[math.ceil(NEAR_LONGEST * len(values)) - 1] if values else None
