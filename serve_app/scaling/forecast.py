"""How much audio comes, how much more may come while a replica starts, and what the past says it takes (pure).

Three ideas, each a frozen value with a step:

- ``Demand``: seconds of audio that arrive in a second: a slow average, which a jump that noise does not explain moves
  at once, up or down.
- ``Window``: the largest or smallest value of the last so many seconds, in at most ``BLOCKS`` numbers.
- ``Rehearsal``: every pair of a headroom and a hold time is run in thought over the demand as it comes, with cold
  starts, whole replicas and a queue. What each would have cost and how much work would have come late is counted;
  the cheapest pair that keeps the objective is what the policy uses. So headroom is learned from the bursts that
  did come, for the cold start there is, and a steady load is not charged for bursts it never has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

SLOW_S = 60.0
"""Time constant of the slow average."""
DEVIATIONS = 5.0
"""A jump stands out of the noise of two seconds' mean by so many standard deviations: by chance once in days."""
LEAST_JUMP = 0.03
"""And by this share of the average, where noise is next to nothing."""
BURST = 1.3
"""From this ratio on a jump is a burst that opens the panic window."""
NOISE_S = 300.0
"""Time constant of the estimate of the noise."""
FIRST_NOISE = 0.3
"""Standard deviation over average, before the noise is known."""
FIRST_SEEN = 5
"""Readings that this first guess counts for: the first few that happen to be alike do not mean that there is none."""
BLOCKS = 40

HEADROOMS: Sequence[float] = (
    1.08, 1.1, 1.12, 1.15, 1.18, 1.21, 1.24, 1.27, 1.3, 1.34, 1.38, 1.42, 1.46, 1.5, 1.6, 1.75, 2.0,
)  # fmt: skip
"""Capacity over demand. Less than the first is no gain: measurements are no better than a few percent."""
_HEADROOMS = np.array(HEADROOMS)
HOLDS: Sequence[float] = (0.25, 1.0, 3.0)
"""In cold starts. One is the classic choice: an idle replica is kept as long as its restart would take."""
SHORTEST_HOLD_S = 10.0
NOTICE_S = 2.0
"""From a jump to the order that answers it."""
MEMORY_S = 24 * 3600.0
"""Time constant of what the rehearsal remembers: a day."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Seconds of audio a second. level: the slow average. fast: of the last two readings. variance: of one reading.
    count: readings that the average is of, since the last jump. seen: in all."""

    level: float = 0.0
    fast: float = 0.0
    variance: float = 0.0
    last: float | None = None
    count: int = 0
    seen: int = 0

    def step(self, arrived: float, dt: float) -> tuple[Demand, float]:
        """With another reading, ``dt`` seconds after the one before: and by what ratio demand has jumped, else 1."""
        if self.last is None:
            return _first(arrived, arrived, count=1), 1.0
        fast = (self.last + arrived) / 2
        if self.level <= 0 < fast:
            # Idling has told nothing about the noise.
            return _first(fast, arrived, count=2), math.inf
        low, high = self._noise()
        if not low <= fast <= high:
            jump = fast / self.level
            # The average begins anew, with these two.
            return replace(self, level=fast, fast=fast, last=arrived, count=2, seen=self.seen + 1), jump
        # Bursts must not pass for noise: what stands out of it counts for no more than the noise's edge.
        residual = min(abs(arrived - self.level), 3 * math.sqrt(self.variance) + LEAST_JUMP * self.level)
        # The first readings count alike: an average that began with one of them would trust it for too long.
        first = 1 / (self.count + 1)
        variance = self.variance + max(1 / (self.seen + 1), 1 - math.exp(-dt / NOISE_S)) * (residual**2 - self.variance)
        level = self.level + max(first, 1 - math.exp(-dt / SLOW_S)) * (arrived - self.level)
        return Demand(
            level=level, fast=fast, variance=variance, last=arrived, count=self.count + 1, seen=self.seen + 1
        ), 1.0

    def _noise(self) -> tuple[float, float]:
        """Between what two seconds' mean lies by chance.

        Recordings bring several windows at once, so the counts lean upwards: like a gamma variable, whose quantiles are
        those of Wilson and Hilferty (1931).
        """
        if self.level <= 0:
            return 0.0, 0.0
        relative = math.sqrt(self.variance) / self.level
        shape = 2 / min(max(relative, 1e-3), 5.0) ** 2
        middle, reach = 1 - 1 / (9 * shape), DEVIATIONS / (3 * math.sqrt(shape))
        low, high = max(0.0, middle - reach) ** 3, (middle + reach) ** 3
        return self.level * min(low, 1 - LEAST_JUMP), self.level * max(high, 1 + LEAST_JUMP)

    @property
    def doubt(self) -> float:
        """Standard deviation of the average by noise, of the average."""
        readings = min(max(self.count, 1), 2 * SLOW_S)
        return math.sqrt(self.variance / readings) / self.level if self.level > 0 else 0.0


def _first(level: float, arrived: float, *, count: int) -> Demand:
    """A demand of which nothing but its level is known."""
    variance = (FIRST_NOISE * level) ** 2
    return Demand(level=level, fast=level, variance=variance, last=arrived, count=count, seen=FIRST_SEEN)


@dataclass(frozen=True, slots=True)
class Window:
    """An extreme of the last so many seconds. blocks: (number of the block of time, value), monotone in value."""

    blocks: tuple[tuple[int, float], ...] = ()

    def step(self, value: float, at: float, seconds: float, better: Callable[[float, float], bool]) -> Window:
        """better(a, b): a is as extreme as b, so b no longer matters."""
        length = max(1.0, seconds / BLOCKS)
        block = int(at // length)
        oldest = block - math.ceil(seconds / length)
        blocks = self.blocks
        if blocks and blocks[0][0] < oldest:
            blocks = tuple(b for b in blocks if b[0] >= oldest)
        kept = len(blocks)
        while kept and better(value, blocks[kept - 1][1]):
            kept -= 1
        if kept and blocks[kept - 1][0] == block:
            # Its block has a more extreme value already, which will leave no sooner.
            return Window(blocks[:kept])
        return Window((*blocks[:kept], (block, value)))

    @property
    def extreme(self) -> float:
        """Raises IndexError before the first step."""
        return self.blocks[0][1]


def largest(window: Window, value: float, at: float, seconds: float) -> Window:
    return window.step(value, at, seconds, _at_least)


def smallest(window: Window, value: float, at: float, seconds: float) -> Window:
    return window.step(value, at, seconds, _at_most)


def _at_least(a: float, b: float) -> bool:
    return a >= b


def _at_most(a: float, b: float) -> bool:
    return a <= b


@dataclass(frozen=True, slots=True)
class Choice:
    """Capacity over demand, and seconds that it is kept after demand has fallen."""

    headroom: float
    hold_s: float


def holds(cold_start_s: float, hold_s: float | None) -> tuple[float, ...]:
    if hold_s is not None:
        return (hold_s,)
    return tuple(max(SHORTEST_HOLD_S, hold * cold_start_s) for hold in HOLDS)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What each choice would have done. Entries go hold by hold, headroom by headroom within.

    tops: for each hold the largest demand within it. lows: the smallest of ``tops`` within a cold start: what had been
    ordered a cold start ago, and not sent away since, is ready.
    backlog: seconds of audio. late, cost: seconds of audio and replica-seconds, both fading over a day, as does work.
    """

    tops: tuple[Window, ...] = ()
    lows: tuple[Window, ...] = ()
    backlog: tuple[float, ...] = ()
    late: tuple[float, ...] = ()
    cost: tuple[float, ...] = ()
    work: float = 0.0
    seconds: float = 0.0

    def step(
        self,
        *,
        demand: float,
        plan: float,
        rate: float | None,
        at: float,
        dt: float,
        cold_start_s: float,
        hold_s: float | None,
        objective_s: float,
        least: int,
    ) -> Rehearsal:
        """demand: as it came. plan: as the policy sees it, to which headroom is added. rate: seconds of audio that one
        replica does in a second. least: fewest replicas allowed."""
        times = holds(cold_start_s, hold_s)
        empty = (Window(),) * len(times)
        tops = tuple(
            largest(window, plan, at, seconds) for window, seconds in zip(self.tops or empty, times, strict=True)
        )
        lows = tuple(
            smallest(window, top.extreme, at, cold_start_s + NOTICE_S)
            for window, top in zip(self.lows or empty, tops, strict=True)
        )
        if rate is None:
            return replace(self, tops=tops, lows=lows)
        fade = math.exp(-dt / MEMORY_S)
        backlog, late, cost = np.array(
            [self.backlog, self.late, self.cost] if self.backlog else np.zeros((3, len(times) * len(HEADROOMS)))
        )
        extremes = np.array([[window.extreme for window in tops], [window.extreme for window in lows]]) / rate
        counts = np.maximum(least, np.ceil(extremes[:, :, None] * _HEADROOMS)).reshape(2, -1)
        ordered, capacity = counts[0], counts[1] * rate
        backlog = np.maximum(0.0, backlog + (demand - capacity) * dt)
        late = late * fade + demand * dt * (backlog > objective_s * capacity)
        cost = cost * fade + ordered * dt
        return Rehearsal(
            tops=tops,
            lows=lows,
            backlog=tuple(backlog.tolist()),
            late=tuple(late.tolist()),
            cost=tuple(cost.tolist()),
            work=self.work * fade + demand * dt,
            seconds=self.seconds + dt,
        )

    def best(self, times: Sequence[float], late_share: float) -> Choice | None:
        """The cheapest choice with at most that share of work late, each excess weighed against its cost: where no
        headroom helps, none is paid for. None before any work."""
        if not self.late or self.work <= 0:
            return None
        least = min(self.cost)
        if least <= 0:
            return None

        def price(index: int) -> tuple[float, float, float]:
            share = self.late[index] / self.work
            excess = max(0.0, share / late_share - 1)
            return (self.cost[index] / least * (1 + EXCESS_PRICE * excess), share, -index)

        index = min(range(len(self.late)), key=price)
        hold, headroom = divmod(index, len(HEADROOMS))
        return Choice(HEADROOMS[headroom], times[hold])


EXCESS_PRICE = 0.25
"""Twice the late work that is allowed weighs as much as a quarter more replicas."""
