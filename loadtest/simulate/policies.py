"""Policies that the simulator plays: this project's, and three that people use today, as their authors describe them.

Each sees the fleet once a second and says how many replicas it wants. The usual ones see exact figures that never go
missing, and the utilization without noise; where a product polls more slowly than once a second, so do they.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loadtest.simulate.world import EPOCH, World
from serve_app.scaling.config import Limits, ScalingSettings
from serve_app.scaling.policy import Decision, State, decide, decide_from


class Policy(Protocol):
    def step(self, world: World) -> Mapping[str, int] | None:
        """Replicas by unit; None: no change."""
        ...


def settings(world: World, gpus: float) -> ScalingSettings:
    """The defaults, with limits that never bind and the cold start that the operator knows."""
    limits = Limits(min_replicas=1, max_replicas=max(10, math.ceil(40 * gpus)))
    return ScalingSettings(
        topology="colocated" if world.topology == "colocated" else "split",
        pods=limits,
        features=limits,
        encoder=limits,
        decoder=limits,
        cold_start_s=world.cold_start_s,
    )


class Ours:
    """The policy under ``serve_app.scaling``. each_reading: it gets a reading from each replica, as in a real fleet;
    else their sums."""

    def __init__(self, config: ScalingSettings, *, each_reading: bool = False):
        self._config, self._each, self.state = config, each_reading, State()
        self.last: Decision | None = None

    def step(self, world: World) -> Mapping[str, int]:
        now = EPOCH + world.now
        if self._each:
            self.state, self.last = decide(self._config, self.state, world.signals(), now)
        else:
            self.state, self.last = decide_from(self._config, self.state, *world.loads(), now)
        return {unit: decision.target for unit, decision in self.last.units.items()}


@dataclass(slots=True)
class Capped:
    """Another policy with a ``max_replicas``."""

    policy: Policy
    max_replicas: int

    def step(self, world: World) -> Mapping[str, int] | None:
        wanted = self.policy.step(world)
        return wanted and {unit: min(count, self.max_replicas) for unit, count in wanted.items()}


@dataclass(slots=True)
class Hpa:
    """Kubernetes' horizontal pod autoscaler: wanted = replicas × value / target, within a tolerance none; the
    largest wish of the stabilization window holds; at most doubled, or four more, in 15 s.

    metric "utilization": SM utilization of the mean GPU, of its saturation point, target 0 to 1.
    metric "queue": windows waiting and running, target a replica, polled as KEDA's scaler does.
    """

    metric: str
    target: float
    stabilization_s: float
    period_s: int = 15
    poll_s: int = 15
    tolerance: float = 0.1
    value: float = 0.0
    wishes: deque[tuple[int, int]] = field(default_factory=deque)

    def step(self, world: World) -> Mapping[str, int] | None:
        fleet = world.units["pods"]
        if world.now % self.poll_s == 0 and world.trace.missing[world.now] < 1:
            self.value = self._measure(world)
        if world.now % self.period_s:
            return None
        ratio = self.value / self.target
        if self.metric == "queue":
            ratio /= max(1, fleet.target)
        counted = fleet.ready if self.metric == "utilization" else fleet.target
        wish = fleet.target if abs(ratio - 1) <= self.tolerance else max(1, math.ceil(counted * ratio - 1e-9))
        if self.metric == "utilization" and ratio > 1:
            wish = max(
                wish, fleet.target
            )  # replicas without a value yet are taken to be idle, and do not raise the wish
        wish = min(wish, max(2 * fleet.target, fleet.target + 4))
        self.wishes.append((world.now, wish))
        while self.wishes[0][0] <= world.now - self.stabilization_s:
            self.wishes.popleft()
        return {"pods": max(wish, max(w for _, w in self.wishes)) if wish < fleet.target else wish}

    def _measure(self, world: World) -> float:
        if self.metric == "utilization":
            return world.pod_utilization()
        return world.waiting() + world.running("decoder") + world.running("encoder")


@dataclass(slots=True)
class Ongoing:
    """Ray Serve's default: the mean of the ongoing requests of the last ``look_back_s`` over ``target`` a replica,
    wanted for as long as the delays say.
    """

    target: float
    up_delay_s: float
    down_delay_s: float
    look_back_s: int = 30
    history: deque[float] = field(default_factory=deque)
    since: int = 0
    direction: int = 0

    def step(self, world: World) -> Mapping[str, int] | None:
        fleet = world.units["pods"]
        self.history.append(world.waiting() + world.running("decoder") + world.running("encoder"))
        if len(self.history) > self.look_back_s:
            self.history.popleft()
        wish = max(1, math.ceil(sum(self.history) / len(self.history) / self.target - 1e-9))
        direction = (wish > fleet.target) - (wish < fleet.target)
        if direction != self.direction:
            self.direction, self.since = direction, world.now
        delay = self.up_delay_s if direction > 0 else self.down_delay_s
        if direction == 0 or world.now - self.since < delay:
            return None
        self.direction = 0
        return {"pods": wish}
