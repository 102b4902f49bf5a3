"""This project's policy with its defaults beside the usual ones, each at its best settings.

The usual policies' settings are chosen with hindsight: each is played with all settings of a grid on the very trace
that it is judged on, with a max_replicas of 1.25 times what the trace's peak needs, and its Pareto front of late
work and cost is kept. They are compared at the cost of this policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.simulate.play import play
from loadtest.simulate.policies import Capped, Hpa, Ongoing, Ours, Policy, settings
from loadtest.simulate.scenarios import trace
from loadtest.simulate.world import World

UTILIZATION, ONGOING, QUEUE = "utilization threshold (HPA)", "ongoing requests (Ray Serve)", "queue length (KEDA)"
USUAL: Sequence[str] = (UTILIZATION, ONGOING, QUEUE)

CAP = 1.25
"""max_replicas of the usual policies, over what the trace's peak needs: without it queues that outlast a cold start
make the last two order without bound."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run. policy: None for this project's, else a usual one with its settings."""

    trace: str
    gpus: float
    cold_start_s: float
    policy: str | None = None
    parameters: tuple[tuple[str, float], ...] = ()
    topology: str = "colocated"


def grid(policy: str) -> Iterable[tuple[tuple[str, float], ...]]:
    """Settings that are swept: targets from very careful to very thrifty, delays from hasty to the product's default.

    Raises ValueError where there is no such policy.
    """
    running = (8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
    if policy == UTILIZATION:
        targets = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
        return [(("target", t), ("stabilization_s", s)) for t in targets for s in (15.0, 60.0, 300.0)]
    if policy == QUEUE:
        return [(("target", t), ("stabilization_s", s)) for t in running for s in (15.0, 60.0, 300.0)]
    if policy == ONGOING:
        delays = ((0.0, 60.0), (0.0, 600.0), (30.0, 600.0))
        return [(("target", t), ("up_delay_s", up), ("down_delay_s", down)) for t in running for up, down in delays]
    raise ValueError(f"no policy {policy!r}")


def usual(policy: str, parameters: Mapping[str, float]) -> Policy:
    if policy == UTILIZATION:
        return Hpa("utilization", parameters["target"], parameters["stabilization_s"])
    if policy == QUEUE:
        return Hpa("queue", parameters["target"], parameters["stabilization_s"], poll_s=30)
    return Ongoing(parameters["target"], parameters["up_delay_s"], parameters["down_delay_s"])


def run(job: Job) -> dict[str, Any]:
    """What came of it: ``Result.summary``, and what was played."""
    world = World(trace(job.trace), gpus=job.gpus, cold_start_s=job.cold_start_s, topology=job.topology)
    policy: Policy
    if job.policy is None:
        policy = Ours(settings(world, job.gpus))
    else:
        most = math.ceil(CAP * float(world.intensity.max()) / world.work.rate)
        policy = Capped(usual(job.policy, dict(job.parameters)), most)
    result, _ = play(world, policy)
    return {
        "trace": job.trace,
        "gpus": job.gpus,
        "cold_start_s": job.cold_start_s,
        "topology": job.topology,
        "policy": job.policy or "ours",
        "parameters": dict(job.parameters),
        **result.summary(),
    }


def front(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that no other beats in both late work and cost, cheapest first."""
    kept: list[Mapping[str, Any]] = []
    least = math.inf
    for point in sorted(points, key=lambda p: (p["cost"], p["late_share"])):
        if point["late_share"] < least:
            kept.append(point)
            least = point["late_share"]
    return kept


def late_at(points: Sequence[Mapping[str, Any]], cost: float) -> float:
    """The least late share that a front has at that cost or less; infinite where it costs more everywhere."""
    return min((p["late_share"] for p in points if p["cost"] <= cost), default=math.inf)


def jobs(name: str, gpus: float, cold_start_s: float) -> list[Job]:
    return [Job(name, gpus, cold_start_s)] + [
        Job(name, gpus, cold_start_s, policy, parameters) for policy in USUAL for parameters in grid(policy)
    ]


def judged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One comparison: of the results of ``jobs``."""
    ours = next(r for r in results if r["policy"] == "ours")
    fronts = {name: front(r for r in results if r["policy"] == name) for name in USUAL}
    at_cost = {name: late_at(points, ours["cost"]) for name, points in fronts.items()}
    return {
        "trace": ours["trace"],
        "gpus": ours["gpus"],
        "cold_start_s": ours["cold_start_s"],
        "ours": ours,
        "fronts": fronts,
        "late_at_our_cost": {name: None if math.isinf(late) else late for name, late in at_cost.items()},
        "better": all(ours["late_share"] < late for late in at_cost.values()),
    }
