"""What the simulator plays: the work, the traces, the objective, cold starts and the clairvoyant optimum.

Everything that a result depends on, other than the policy, is defined here.

*Work.* Windows of 30 s. One GPU does large-v3 at 0.3 ms (features), 4.4 ms (encoder) and 8 ms (decoder) of its time
a window in full batches: 79 windows, 2,360 seconds of audio, a second. A pod of the colocated topology is one GPU.
In the split topology an encoder or a decoder replica has a GPU and a features replica a tenth of one.

*Arrivals.* Recordings come as a Poisson process whose intensity is the trace; a recording has a geometric number of
windows, four in the mean, that come together. So the count of windows in a second has seven times the variance of a
Poisson count.

*Traces.* ``gpus`` scales each: a load of 1 keeps that many GPUs busy to the full, without reserve.

- constant: 0.6 for an hour (for four with ``constant_long``).
- step: 0.4, from the 30th minute on 0.8; two hours.
- diurnal: a day between 0.2 (night) and 1 (afternoon), a raised cosine, times noise of 3 % that lasts ten minutes.
- bursts: a day of 0.6 with bursts on top that nothing announces: one in ten minutes in the mean (Poisson), each 10
  % to 50 % of the base load (uniform), 90 s long in the mean (exponential), rising in 5 s; bursts may coincide.
- diurnal_6h, bursts_6h: the day squeezed into six hours, and six hours of bursts, for comparisons of many settings.
- tall_bursts: as bursts, one in half an hour, each 100 % to 200 % of the base load of 0.3.
- flash_crowd: 0.2; after one hour it rises to 1 within 10 s, stays for 20 minutes and fades (time constant 10
  minutes); four hours.
- slow_starts: a day of diurnal load in six hours; each cold start is the nominal one times a log-normal factor
  (median 1, sigma 0.6: one in a hundred is four times as long).
- lost_signals: the same load, nominal cold starts; at any second each replica's reading is missing with a chance of
  20 %, and no reading comes at all for five minutes of each hour.
- dying_nodes: the same load; a replica lives six hours in the mean, and at the third hour a tenth of the fleet dies
  at once. What a dead replica was running is run again; its successor is ordered at once.

Each trace begins with as many ready replicas as its first load needs at a utilization of 75 %.

*Objective.* The 99th percentile of the wait (time from arrival to result, less the service itself) is at most 2 s;
a window that waits longer is late, so at most 1 % may be late.

*Cold starts.* 30, 120 and 300 s from the order to the first batch. A replica is paid for from its order until it
goes.

*The clairvoyant optimum.* The fewest GPU hours of a fleet that knows the trace's intensity (not the recordings'
random times), serves all of it without reserve, and orders each replica one cold start before it is needed: at
every second the intensity over a replica's rate, rounded up, at least one replica. A replica that is not needed for
longer than a cold start goes and is ordered again, paying the cold start; for shorter it stays. As all replicas are
alike, this rule, level by level, is optimal. It has no reserve for the randomness of arrivals, so no real fleet
reaches it; on the other hand it may not be late with even one window of the expected work, while a policy may be
with 1 %.

*Safe count.* The intensity over a replica's rate, rounded up: with fewer the queue grows without bound. No decision
to scale down may go below it. (Above it a fleet can still be late: after a burst, until cold starts are over.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOW_S = 30.0
STAGES: Sequence[str] = ("features", "encoder", "decoder")
GPU_SECONDS: Mapping[str, Mapping[str, float]] = {
    "large-v3": {"features": 0.0003, "encoder": 0.0044, "decoder": 0.0080},
    "turbo": {"features": 0.0003, "encoder": 0.0044, "decoder": 0.00107},
}
"""GPU time of one window in full batches, by model and stage."""
SPLIT_GPUS: Mapping[str, float] = {"features": 0.1, "encoder": 1.0, "decoder": 1.0}
"""What a replica of the split topology holds."""

WINDOWS_A_RECORDING = 4.0
OBJECTIVE_S = 2.0
LATE_SHARE = 0.01
COST_GOAL = 1.25
COLD_STARTS_S: Sequence[float] = (30.0, 120.0, 300.0)
START_UTILIZATION = 0.75
HOUR = 3600


@dataclass(frozen=True, slots=True)
class Trace:
    """expected: load in each second, 1 for ``gpus`` busy GPUs. missing: share of readings lost in each second.

    cold_sigma: of the logarithm of a cold start's factor. life_s: of a replica, in the mean; None: none dies.
    mass_death: (second, share of the fleet). step_at: when the load steps up, for the settling time.
    """

    name: str
    expected: Array
    missing: Array
    cold_sigma: float = 0.0
    life_s: float | None = None
    mass_death: tuple[int, float] | None = None
    step_at: int | None = None

    @property
    def seconds(self) -> int:
        return len(self.expected)


@dataclass(frozen=True, slots=True)
class Work:
    """GPU seconds of a window by stage. rate: windows a second of one colocated GPU."""

    costs: Mapping[str, float] = field(default_factory=lambda: GPU_SECONDS["large-v3"])

    @property
    def rate(self) -> float:
        return 1 / sum(self.costs.values())

    def split_rate(self, stage: str) -> float:
        """Windows a second of one replica of the split topology."""
        return SPLIT_GPUS[stage] / self.costs[stage]


def _diurnal(seconds: int, rng: np.random.Generator) -> Array:
    """A day, squeezed into so many seconds."""
    phase = np.linspace(0, 2 * math.pi, seconds, endpoint=False)
    return (0.2 + 0.8 * (1 - np.cos(phase)) / 2) * (1 + _noise(seconds, 600.0, 0.03, rng))


def _noise(seconds: int, lasting_s: float, deviation: float, rng: np.random.Generator) -> Array:
    """A first-order process: its deviation, and the time constant of its memory."""
    keep = math.exp(-1 / lasting_s)
    steps = rng.normal(0, deviation * math.sqrt(1 - keep**2), seconds)
    values = np.empty(seconds)
    value = 0.0
    for i, step in enumerate(steps.tolist()):
        value = value * keep + step
        values[i] = value
    return values


def _bursts(
    seconds: int, base: float, every_s: float, low: float, high: float, long_s: float, rng: np.random.Generator
) -> Array:
    time = np.arange(seconds, dtype=float)
    load = np.full(seconds, base)
    for start in np.sort(rng.uniform(0, seconds, rng.poisson(seconds / every_s))):
        height, length = base * rng.uniform(low, high), rng.exponential(long_s)
        load += height * np.clip((time - start) / 5, 0, 1) * (time < start + length)
    return load


def _flash_crowd() -> Array:
    time = np.arange(4 * HOUR, dtype=float)
    peak, end = float(HOUR), float(HOUR + 20 * 60)
    crowd = np.where(time < end, np.clip((time - peak) / 10, 0, 1), np.exp(-(time - end) / 600))
    return np.asarray(0.2 + 0.8 * crowd)


def trace(name: str, seed: int = 0) -> Trace:
    """Raises ValueError where there is no such trace."""
    rng = np.random.default_rng([seed, *name.encode()])

    def made(expected: Array, missing: Array | None = None, **more: object) -> Trace:
        lost = np.zeros(len(expected)) if missing is None else missing
        return Trace(name, expected, lost, **more)  # type: ignore[arg-type]

    day = 24 * HOUR
    if name == "constant":
        return made(np.full(HOUR, 0.6))
    if name == "constant_long":
        return made(np.full(4 * HOUR, 0.6))
    if name == "step":
        return made(np.where(np.arange(2 * HOUR) < HOUR // 2, 0.4, 0.8), step_at=HOUR // 2)
    if name == "diurnal":
        return made(_diurnal(day, rng))
    if name == "bursts":
        return made(_bursts(day, 0.6, 600, 0.1, 0.5, 90, rng))
    if name == "diurnal_6h":
        return made(_diurnal(6 * HOUR, rng))
    if name == "bursts_6h":
        return made(_bursts(6 * HOUR, 0.6, 600, 0.1, 0.5, 90, rng))
    if name == "tall_bursts":
        return made(_bursts(day, 0.3, 1800, 1.0, 2.0, 90, rng))
    if name == "flash_crowd":
        return made(_flash_crowd(), step_at=HOUR)
    if name == "slow_starts":
        return made(_diurnal(6 * HOUR, rng), cold_sigma=0.6)
    if name == "lost_signals":
        time = np.arange(6 * HOUR)
        return made(_diurnal(6 * HOUR, rng), np.where(time % HOUR < 300, 1.0, 0.2))
    if name == "dying_nodes":
        return made(_diurnal(6 * HOUR, rng), life_s=6.0 * HOUR, mass_death=(3 * HOUR, 0.1))
    raise ValueError(f"no trace {name!r}; there are {', '.join(TRACES)}")


TRACES: Sequence[str] = (
    "constant",
    "constant_long",
    "step",
    "diurnal",
    "bursts",
    "diurnal_6h",
    "bursts_6h",
    "tall_bursts",
    "flash_crowd",
    "slow_starts",
    "lost_signals",
    "dying_nodes",
)
GOAL_TRACES: Sequence[str] = ("diurnal", "bursts")
"""At most 1 % late at no more than 1.25 times the optimum's GPU hours."""


def arrivals(intensity: Array, rng: np.random.Generator) -> Array:
    """Windows that arrive in each second. intensity: windows a second."""
    recordings = rng.poisson(intensity / WINDOWS_A_RECORDING)
    some = recordings > 0
    windows = recordings.astype(float)
    # A geometric count beyond each recording's first window: together a negative binomial.
    windows[some] += rng.negative_binomial(recordings[some], 1 / WINDOWS_A_RECORDING)
    return windows


def safe_counts(intensity: Array, rate: float) -> NDArray[np.int64]:
    """intensity, rate: windows a second, of one replica."""
    return np.ceil(intensity / rate - 1e-9).astype(np.int64)


def clairvoyant(intensity: Array, rate: float, cold_start_s: float, least: int = 1) -> tuple[Array, float]:
    """The optimum's replicas in each second, and the replica-seconds that it pays for, cold starts included."""
    needed = np.maximum(safe_counts(intensity, rate), least).astype(float)
    width = int(cold_start_s) + 1
    padded = np.concatenate([np.zeros(width), needed, np.zeros(width)])
    # The largest of the next seconds, then the smallest of the last: gaps of up to a cold start are filled.
    reach = forward_max(padded, width)
    kept = -forward_max(-reach[::-1], width)[::-1][width : width + len(needed)]
    starts = np.maximum(np.diff(kept), 0).sum()
    return kept, float(kept.sum() + cold_start_s * starts)


def forward_max(values: Array, width: int) -> Array:
    """out[i] = max(values[i : i + width])."""
    out, reach = values.copy(), 1
    while reach < width:
        step = min(reach, width - reach)
        out[:-step] = np.maximum(out[:-step], out[step:])
        reach += step
    return out
