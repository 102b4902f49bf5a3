"""The comparison: which fixed batch is the best, by simulation with measured costs, and what it and the adaptive way
sustain, by runs of the real engine in real time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.batching.machines import STARTS, Costs, Machine, SimulatedMachine
from loadtest.batching.strategies import Adaptive, Fixed, Strategy
from loadtest.batching.windows import LONGEST_S, SHORTEST_S, TOKENS_A_SECOND, percentile, poisson
from serve_app.batching.feedback import FeedbackSettings

GOAL = 1.41
SHARE = 0.99
"""Of the windows, that must be done within the objective."""
SIMULATED = 4000
"""Windows of one simulated run."""
WARM_UP = 0.2
"""The first of a run's windows do not count."""
ROUNDS = 8
"""Of halving the range of loads."""
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WAITS = (0.0, 0.05, 0.1, 0.25, 0.5)
"""Of the objective."""
MEAN_S = (SHORTEST_S + LONGEST_S) / 2
LEAST_RUN_S = 5.0
STEP = 1.06
"""To the second load that is tried on the real engine."""

Print = Callable[[str], None]


class ObjectiveOutOfReach(Exception):
    """Not even single windows are done in time."""


@dataclass(frozen=True, slots=True)
class Run:
    """A strategy at a load, in windows a second. p50_s, p99_s: latencies of the windows that count."""

    rate: float
    windows: int
    p50_s: float
    p99_s: float
    objective_s: float

    @property
    def held(self) -> bool:
        return self.p99_s <= self.objective_s

    @property
    def rtfx(self) -> float:
        """Seconds of audio a second."""
        return self.rate * MEAN_S


def run(strategy: Strategy, machine: Machine, rate: float, count: int, objective_s: float, seed: int) -> Run:
    windows = poisson(rate, count, seed)
    latencies = strategy.run(machine, windows, give_up_s=2 * objective_s)
    counted = latencies[int(WARM_UP * count) :]
    return Run(rate, len(counted), percentile(counted, 0.5), percentile(counted, SHARE), objective_s)


def ceiling(costs: Costs) -> float:
    """Windows a second that no strategy exceeds: all batches as good as they can be, and never a wait."""
    return 1 / (costs.encoder_best + (STARTS - 1 + MEAN_S * TOKENS_A_SECOND) * costs.step_best)


def sustained(strategy: Strategy, costs: Costs, objective_s: float, count: int = SIMULATED) -> Run:
    """The largest load that a strategy holds on the simulated machine."""
    machine = SimulatedMachine(costs)
    best, low, high = Run(0.0, 0, math.inf, math.inf, objective_s), 0.0, ceiling(costs)
    for _ in range(ROUNDS):
        tried = run(strategy, machine, (low + high) / 2, count, objective_s, seed=1)
        if tried.held:
            best, low = tried, tried.rate
        else:
            high = tried.rate
    return best


@dataclass(frozen=True, slots=True)
class Point:
    """Of the grid: what one fixed batch sustains."""

    strategy: Fixed
    run: Run


def grid(costs: Costs, objective_s: float, sizes: Sequence[int] = SIZES) -> list[Point]:
    """Every fixed size and wait, the best first; among equals the smallest."""
    points = [
        Point(fixed, sustained(fixed, costs, objective_s))
        for size in sizes
        if size <= costs.slots
        for fixed in (Fixed(size, share * objective_s) for share in WAITS)
    ]
    return sorted(points, key=lambda point: -point.run.rate)


@dataclass(eq=False, slots=True)
class Candidate:
    """A strategy whose limit is looked for on the real engine."""

    strategy: Strategy
    expected: float
    runs: list[Run] = field(default_factory=list)

    @property
    def best(self) -> Run | None:
        """At the largest load that it held, below those that it did not."""
        return max(
            (run for run in self.runs if run.held and run.rate < self.failed), key=lambda r: r.rate, default=None
        )

    @property
    def failed(self) -> float:
        return min((run.rate for run in self.runs if not run.held), default=math.inf)

    @property
    def next_rate(self) -> float:
        """Nearer to the limit than the loads so far; where only one side of it is known, in steps that grow."""
        if not self.runs:
            return self.expected
        step = STEP ** len(self.runs)
        if self.best is None:
            return self.failed / step
        return self.best.rate * step if math.isinf(self.failed) else (self.best.rate + self.failed) / 2


def confirm(
    candidates: Sequence[Candidate], machine: Machine, objective_s: float, *, seconds: float, run_s: float
) -> Iterator[tuple[Candidate, Run]]:
    """Runs candidates in turn, nearer and nearer to their limits, as long as there is time for another run of ``run_s``
    seconds of arrivals; each at least once."""
    machine.begin()
    left, turn = seconds, 0
    while turn < len(candidates) or left > run_s + objective_s:
        candidate = candidates[turn % len(candidates)]
        rate = candidate.next_rate
        one = run(candidate.strategy, machine, rate, max(1, round(rate * run_s)), objective_s, seed=100 + turn)
        left -= machine.now()
        candidate.runs.append(one)
        yield candidate, one
        turn += 1


@dataclass(frozen=True, slots=True)
class Simulated:
    """What each way sustains by simulation, at one latency objective."""

    objective_s: float
    adaptive: Run
    unadjusted: Run
    fixed: list[Point]

    @property
    def ratio(self) -> float:
        return self.adaptive.rate / self.fixed[0].run.rate if self.fixed[0].run.rate else math.inf


def adaptive(costs: Costs, objective_s: float, encoder_start: int, *, feedback: bool = True) -> Adaptive:
    return Adaptive(costs, objective_s, encoder_start, FeedbackSettings(enabled=feedback))


def simulate(costs: Costs, objective_s: float, encoder_start: int) -> Simulated:
    return Simulated(
        objective_s,
        sustained(adaptive(costs, objective_s, encoder_start), costs, objective_s),
        sustained(adaptive(costs, objective_s, encoder_start, feedback=False), costs, objective_s),
        grid(costs, objective_s),
    )


def compare(
    machine: Machine,
    costs: Costs,
    objectives: Sequence[float],
    *,
    encoder_start: int,
    seconds: float,
    runs: int,
    say: Print,
) -> dict[str, Any]:
    """Simulates every objective and confirms the first, all within about ``seconds``. encoder_start: windows in the
    encoder's first batches; runs: of the real engine, about so many. Returns what a report keeps."""
    begun = time.monotonic()
    simulated = []
    for objective_s in objectives:
        simulated.append(one := simulate(costs, objective_s, encoder_start))
        say(
            f"simulated, p99 within {objective_s:g} s: adaptive {one.adaptive.rate:.2f} windows/s (without feedback "
            f"{one.unadjusted.rate:.2f}), best fixed {one.fixed[0].run.rate:.2f} ({one.fixed[0].strategy}): "
            f"{one.ratio:.2f} times"
        )
    first = simulated[0]
    if not (first.fixed[0].run.rate and first.adaptive.rate):
        raise ObjectiveOutOfReach(f"no load at all is done within {first.objective_s:g} s on this device")
    candidates = [
        Candidate(first.fixed[0].strategy, first.fixed[0].run.rate),
        Candidate(adaptive(costs, first.objective_s, encoder_start), first.adaptive.rate),
    ]
    left = seconds - (time.monotonic() - begun)
    run_s = max(LEAST_RUN_S, left / runs - first.objective_s)
    say(f"real time, p99 within {first.objective_s:g} s, runs of {run_s:.0f} s:")
    for candidate, one_run in confirm(candidates, machine, first.objective_s, seconds=left, run_s=run_s):
        say(
            f"  {candidate.strategy}: {one_run.rate:.2f} windows/s, p50 {one_run.p50_s:.2f} s, p99 {one_run.p99_s:.2f} "
            f"s of {one_run.windows}: {'held' if one_run.held else 'missed'}"
        )
    fixed, ours = candidates
    ratio = ours.best.rate / fixed.best.rate if ours.best and fixed.best else None
    if ratio is None:
        say("no ratio: one of them held the objective at none of the loads tried")
    else:
        say(f"adaptive sustains {ratio:.2f} times the best fixed batch; goal: at least {GOAL}")
    return {
        "goal": GOAL,
        "ratio": ratio,
        "costs": asdict(costs),
        "simulated": [_simulated(one) for one in simulated],
        "real": [_candidate(candidate) for candidate in candidates],
    }


def _run(one: Run) -> dict[str, Any]:
    return asdict(one) | {"held": one.held, "rtfx": one.rtfx}


def _simulated(one: Simulated) -> dict[str, Any]:
    return {
        "objective_s": one.objective_s,
        "ratio": one.ratio,
        "adaptive": _run(one.adaptive),
        "without_feedback": _run(one.unadjusted),
        "fixed": [asdict(point.strategy) | _run(point.run) for point in one.fixed],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"strategy": str(candidate.strategy), "runs": [_run(one) for one in candidate.runs]}
