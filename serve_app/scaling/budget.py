"""GPUs that do not suffice for all that the stages want are shared so that no stage waits for another (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """least, wanted: replicas. gpus: what one of them holds. rate: seconds of audio that one does in a second."""

    least: int
    wanted: int
    gpus: float
    rate: float


def share(claims: Mapping[str, Claim], gpus: float) -> dict[str, int]:
    """Replicas for each stage, at most as many as wanted, that together hold at most ``gpus``.

    The pipeline is as fast as its slowest stage, so replicas go where the least audio passes. The least replicas are
    given in any case, even where they alone exceed the budget: without them nothing passes.
    """
    wanted = {name: max(claim.least, claim.wanted) for name, claim in claims.items()}
    if _held(claims, wanted) <= gpus:
        return wanted
    low, high = 0.0, max(claim.rate * wanted[name] for name, claim in claims.items())

    def for_flow(flow: float) -> dict[str, int]:
        return {
            name: max(claim.least, min(wanted[name], math.floor(flow / claim.rate + 1e-9)))
            for name, claim in claims.items()
        }

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _held(claims, for_flow(middle)) <= gpus else (low, middle)
    given = for_flow(low)
    # What whole replicas leave over: to the slowest stage that it still feeds.
    while True:
        left = gpus - _held(claims, given) + 1e-9
        fitting = [name for name, claim in claims.items() if given[name] < wanted[name] and claim.gpus <= left]
        if not fitting:
            return given
        slowest = min(fitting, key=lambda name: (given[name] * claims[name].rate, name))
        given[slowest] += 1


def _held(claims: Mapping[str, Claim], counts: Mapping[str, int]) -> float:
    return sum(claim.gpus * counts[name] for name, claim in claims.items())
