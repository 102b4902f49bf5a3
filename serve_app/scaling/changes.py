"""What a decision changes, stage by stage, for whoever tells of it (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve_app.scaling.load import Signals
from serve_app.scaling.policy import PODS, Decision, Reason
from serve_app.scaling.readings import STAGES, Stage

Direction = Literal["up", "down", "hold"]

EXPECTED: dict[Direction, tuple[Reason, ...]] = {"up": ("demand", "burst", "queue", "wake"), "down": ("fewer", "idle")}
"""Decisions whose counters are shown from the start."""


@dataclass(frozen=True, slots=True)
class Change:
    """before, target: replicas asked for until now, and from now on. ready: those that run. reason, words: why, as in
    ``UnitDecision``."""

    stage: Stage
    before: int
    target: int
    ready: int
    reason: Reason
    words: str

    @property
    def direction(self) -> Direction:
        return "up" if self.target > self.before else "down" if self.target < self.before else "hold"

    def __str__(self) -> str:
        return f"{self.stage}: {self.before} → {self.target} replicas ({self.reason}): {self.words}"


def changes(signals: Signals, decision: Decision) -> list[Change]:
    """Of every stage, those that stay as they are included."""
    found = []
    for stage, target in decision.targets.items():
        unit = decision.units.get(stage) or decision.units[PODS]
        before = signals.stages[stage]
        found.append(Change(stage, before.target, target, before.ready, unit.reason, unit.words))
    return found


def expected() -> Iterator[tuple[Stage, Direction, Reason]]:
    """``EXPECTED`` for every stage."""
    for stage in STAGES:
        for direction, reasons in EXPECTED.items():
            for reason in reasons:
                yield stage, direction, reason
