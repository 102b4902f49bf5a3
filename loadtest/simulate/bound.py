"""How cheap a fleet could be that sees bursts only once they are there, were its settings chosen with hindsight.

Such a fleet knows the load of the moment exactly, one second late, and not what comes. It wants the larger of a
fixed floor and a headroom times the largest load of the hold time; what it orders is ready a cold start later. All
combinations of floor, headroom and hold time are played, without whole replicas, noise or batches, on the very
trace that they are judged on. The cheapest that keeps the objective bounds what a policy of this kind can reach,
learned or configured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loadtest.simulate.scenarios import LATE_SHARE, OBJECTIVE_S, Array, Work, clairvoyant, forward_max, trace

FLOORS = (0.0, 1.2, 1.3, 1.35, 1.4, 1.45, 1.5, 1.55)
"""Of the median load."""
HEADROOMS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.24, 1.28, 1.32, 1.36, 1.4, 1.44, 1.48, 1.52)
HOLDS_S = (5, 15, 60, 300)
NOTICE_S = 1


def cheapest(name: str, gpus: float, cold_start_s: float) -> dict[str, Any]:
    """cost: over the clairvoyant optimum's; infinite where no setting keeps the objective."""
    load = trace(name).expected * gpus
    rate = Work().rate
    _, optimum = clairvoyant(load * rate, rate, cold_start_s)
    seen = np.concatenate([np.full(NOTICE_S, load[0]), load[:-NOTICE_S]])
    median = float(np.median(load))
    best: dict[str, Any] = {"cost": float("inf")}
    for hold in HOLDS_S:
        top = _last_max(seen, hold)
        for floor in FLOORS:
            wanted = np.maximum(floor * median, np.outer(top, HEADROOMS))
            ready = np.stack([-_last_max(-column, int(cold_start_s) + 1) for column in wanted.T], axis=1)
            late, cost = _late(load, ready), wanted.sum(axis=0) / optimum
            for i in np.flatnonzero(late <= LATE_SHARE):
                if cost[i] < best["cost"]:
                    best = {"cost": float(cost[i]), "late_share": float(late[i]), "floor": floor}
                    best |= {"headroom": HEADROOMS[i], "hold_s": hold}
    return {"trace": name, "gpus": gpus, "cold_start_s": cold_start_s, **best}


def _last_max(values: Array, width: int) -> Array:
    """out[i] = max(values[i - width + 1 : i + 1])."""
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return forward_max(padded, width)[: len(values)]


def _late(load: Array, ready: Array) -> Array:
    """Late share of each column of ready."""
    backlog, late = np.zeros(ready.shape[1]), np.zeros(ready.shape[1])
    for demand, capacity in zip(load.tolist(), ready, strict=True):
        backlog = np.maximum(0.0, backlog + demand - capacity)
        late += demand * (backlog > OBJECTIVE_S * capacity)
    share: Array = late / load.sum()
    return share
