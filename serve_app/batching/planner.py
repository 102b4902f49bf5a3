"""In which order a replica takes its waiting windows, and which of them make a batch (pure).

Order is by *due time*: the request's deadline, or the arrival plus the patience of its priority, whichever is earlier.
Every window's due time is finite and later arrivals of the same priority are due later, so none starves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve_app.engine.options import Priority

PATIENCE_S: Mapping[Priority, float] = {"interactive": 0.5, "normal": 10.0, "batch": 120.0}
"""How long a window of each priority may be overtaken by more urgent ones."""

SIMILAR = 0.5
"""A batch is padded to its longest window: first come windows at least this fraction of the most urgent one's cost,
and at most its inverse."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A window that waits for a replica.

    cost: in the stage's own unit (samples, windows, predicted steps), above 0.
    deadline, arrived: seconds of one monotonic clock.
    alone: the window must not share a batch, because a replica died while it ran.
    """

    window_id: str
    cost: float
    arrived: float
    deadline: float
    priority: Priority = "normal"
    alone: bool = False

    @property
    def due(self) -> float:
        return min(self.deadline, self.arrived + PATIENCE_S[self.priority])


def expired(waiting: Iterable[Waiting], now: float) -> list[Waiting]:
    """Windows whose deadline has passed: nobody waits for them any more."""
    return [w for w in waiting if w.deadline <= now]


def plan(waiting: Iterable[Waiting], *, budget: float, padded: bool = True) -> list[Waiting]:
    """The next batch: the most urgent window, and with it as many others as the budget holds.

    budget: in the unit of ``cost``. A window that alone exceeds it still gets a batch of its own.
    padded: every window of the batch costs as much as its longest (a rectangular batch), so windows similar to the most
    urgent one are taken first; else costs add up, and windows are taken in order of urgency alone.
    """
    order = sorted(waiting, key=lambda w: (w.due, w.arrived, w.window_id))
    if not order:
        return []
    head = order[0]
    if head.alone:
        return [head]
    candidates = [w for w in order[1:] if not w.alone]
    if padded:
        # stable: within the similar and the others, urgency decides
        candidates.sort(key=lambda w: not SIMILAR <= w.cost / head.cost <= 1 / SIMILAR)
    batch, total, longest = [head], head.cost, head.cost
    for w in candidates:
        cost = max(longest, w.cost) * (len(batch) + 1) if padded else total + w.cost
        if cost <= budget:
            batch.append(w)
            total, longest = total + w.cost, max(longest, w.cost)
    return batch
