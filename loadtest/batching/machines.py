"""What a strategy drives: an encoder and a decoder with slots on one device, and a clock. Here the simulated one, whose
work takes what was measured; ``loadtest.batching.engine`` has the real one."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

STARTS = 4
"""Tokens of the start sequence: a window's first token comes with the last of them."""


class Machine(Protocol):
    """slots: windows that can be decoded at once. active: that are being decoded."""

    @property
    def slots(self) -> int: ...

    @property
    def active(self) -> int: ...

    def now(self) -> float:
        """Seconds since ``begin``."""

    def begin(self) -> None:
        """Starts the clock, with all slots empty."""

    def sleep_until(self, at: float) -> None: ...

    def encode(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        """Encodes windows, known by their numbers, and puts them into free slots, to leave after so many tokens."""

    def step(self) -> list[int]:
        """One token for every window in a slot; returns those that have ended."""

    def drain(self) -> None:
        """Steps until every window has ended."""

    def encodings(self) -> list[tuple[int, float]]:
        """Windows and seconds of the encodings that are known to have ended since the last call."""


@dataclass(frozen=True)
class Costs:
    """What was measured on a device. encoder, step: seconds, by windows in the batch and by slots in use, ascending.
    lag: steps for which a window that has ended holds its slot."""

    encoder: dict[int, float]
    step: dict[int, float]
    lag: int

    def __post_init__(self) -> None:
        for name, curve in (("encoder", self.encoder), ("step", self.step)):
            if not curve or list(curve) != sorted(curve) or min(curve) < 1 or min(curve.values()) <= 0:
                raise ValueError(f"costs of the {name} must be positive seconds by ascending sizes, not {curve}")

    @property
    def slots(self) -> int:
        return max(self.step)

    @property
    def most_encoded(self) -> int:
        return max(self.encoder)

    @cached_property
    def encoder_best(self) -> float:
        """Seconds a window in the best batch."""
        return min(seconds / size for size, seconds in self.encoder.items())

    @cached_property
    def step_best(self) -> float:
        """Seconds a slot's step at the best number of slots."""
        return min(seconds / size for size, seconds in self.step.items())

    @cached_property
    def _encodings(self) -> list[float]:
        return [0.0, *(between(self.encoder, n + 1) for n in range(self.most_encoded))]

    @cached_property
    def _steps(self) -> list[float]:
        return [0.0, *(between(self.step, n + 1) for n in range(self.slots))]

    def encoding_s(self, windows: int) -> float:
        """Larger batches than measured are cut."""
        whole, rest = divmod(windows, self.most_encoded)
        return whole * self._encodings[-1] + self._encodings[rest]

    def step_s(self, slots: int) -> float:
        return self._steps[slots]


def between(curve: dict[int, float], size: int) -> float:
    """A curve at a size, straight between its points, and as at its ends beyond them (pure)."""
    sizes = list(curve)
    i = bisect_left(sizes, size)
    if i == 0 or i == len(sizes):
        return curve[sizes[min(i, len(sizes) - 1)]]
    low, high = sizes[i - 1], sizes[i]
    return curve[low] + (curve[high] - curve[low]) * (size - low) / (high - low)


class SimulatedMachine:
    def __init__(self, costs: Costs):
        self.costs = costs
        self.slots = costs.slots
        self.begin()

    def begin(self) -> None:
        self._now = 0.0
        self._taken = 0  # steps
        self._ends: list[tuple[int, int]] = []  # step after which a window leaves, its number
        self._encodings: list[tuple[int, float]] = []

    @property
    def active(self) -> int:
        return len(self._ends)

    def now(self) -> float:
        return self._now

    def sleep_until(self, at: float) -> None:
        self._now = max(self._now, at)

    def encode(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        seconds = self.costs.encoding_s(len(numbers))
        self._now += seconds
        self._encodings.append((len(numbers), seconds))
        for number, count in zip(numbers, tokens, strict=True):
            heapq.heappush(self._ends, (self._taken + STARTS - 1 + count + self.costs.lag, number))
        if self.active > self.slots:
            raise ValueError(f"{self.active} windows in {self.slots} slots")

    def step(self) -> list[int]:
        self._now += self.costs.step_s(self.active)
        self._taken += 1
        ended = []
        while self._ends and self._ends[0][0] <= self._taken:
            ended.append(heapq.heappop(self._ends)[1])
        return ended

    def drain(self) -> None:
        while self._ends:
            at = self._ends[0][0]
            self._now += (at - self._taken) * self.costs.step_s(self.active)
            self._taken = at
            while self._ends and self._ends[0][0] <= at:
                heapq.heappop(self._ends)

    def encodings(self) -> list[tuple[int, float]]:
        known, self._encodings = self._encodings, []
        return known
