"""Readings of a GPU over phases of load, and whether separate readings confirm them (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loadtest.gpu.nvidia_smi import Row
from loadtest.gpu.work import WINDOW_S

PHASES = ("idle", "encoder", "decoder", "engine")
EDGE_S = 1.5
"""Readings so near to a phase's ends are of the one beside, too."""

TOLERANCES = {
    "sm_utilization": (0.05, 0.0),
    "sm_occupancy": (0.05, 0.0),
    "tensor_activity": (0.05, 0.0),
    "dram_utilization": (0.05, 0.0),
    "power_w": (20.0, 0.1),
    "temperature_c": (4.0, 0.0),
    "memory_used": (768.0 * 2**20, 0.02),  # some drivers count their own part here, and not there
}
"""By how much the means of a phase may differ: so much, or by this part of nvidia-smi's. Amounts that are not named may
differ by 15 %."""

RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "idle": {"sm_utilization": (0.0, 0.02), "dram_utilization": (0.0, 0.02), "tflops": (0.0, 0.0)},
    "encoder": {
        "sm_utilization": (0.8, 1.0),
        "tensor_activity": (0.3, 1.0),
        "dram_utilization": (0.05, 0.9),
        "gpu_share": (0.9, 1.0),
        "power_w": (300.0, 720.0),
    },
    "decoder": {
        "sm_utilization": (0.6, 1.0),
        "dram_utilization": (0.2, 1.0),
        "gpu_share": (0.8, 1.0),
        "power_w": (200.0, 720.0),
    },
    "engine": {"sm_utilization": (0.6, 1.0), "gpu_share": (0.8, 1.0), "power_w": (200.0, 720.0)},
}
"""What is to be expected on an H100 80 GB (SXM, 700 W) with large-v3's shapes; elsewhere a reading out of its range is
told, and fails nothing."""

TOTALS = ("busy", "gpu_share", "tflops", "rtfx", "tokens_per_s")
"""Readings that add up over a phase; the others are nvidia-smi's to compare, away from the phase's edges."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Ours, of the ``seconds`` before ``at``."""

    at: float
    seconds: float
    values: dict[str, float]


@dataclass(slots=True)
class Phase:
    """What happened in a phase, from begin to end in Unix time. windows: that went through its work; a decoder's
    window is 128 steps of a slot. operations: of these, by the engine's count."""

    name: str
    begin: float
    end: float = 0.0
    windows: float = 0.0
    operations: float = 0.0
    tokens: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric in one phase. theirs: None where nvidia-smi does not tell. agrees, in_range: None where there is
    nothing to hold it against."""

    phase: str
    metric: str
    ours: float | None
    low: float | None
    high: float | None
    theirs: float | None
    agrees: bool | None
    expected: tuple[float, float] | None
    in_range: bool | None


@dataclass(slots=True)
class Result:
    phases: list[Phase] = field(default_factory=list)
    ours: list[Reading] = field(default_factory=list)
    theirs: list[Row] = field(default_factory=list)
    queried: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare(
    result: Result, *, peak: float | None, ranges: Mapping[str, Mapping[str, tuple[float, float]]]
) -> list[Compared]:
    found: list[Compared] = []
    for phase in result.phases:
        whole = [r for r in result.ours if phase.begin <= r.at <= phase.end]
        inner = [r for r in whole if _is_inside(phase, r.at)]
        theirs = [r for r in result.theirs if _is_inside(phase, r.at)]
        names = sorted({name for r in whole for name in r.values} - {"memory_total", "dram_peak"})
        for name in names:
            readings = [r for r in (whole if name in TOTALS else inner) if name in r.values]
            if not readings:
                continue
            mine = [r.values[name] for r in readings]
            other = [r.values[name] for r in theirs if name in r.values]
            mean = statistics.fmean(mine, [r.seconds for r in readings])
            beside = statistics.fmean(other) if other else None
            if name == "tflops":
                beside = phase.operations / phase.seconds / 1e12
            elif name == "rtfx" and phase.name == "engine":
                beside = phase.windows * WINDOW_S / phase.seconds
            elif name == "tokens_per_s" and phase.name == "engine":
                beside = phase.tokens / phase.seconds
            expected = ranges.get(phase.name, {}).get(name)
            agrees = None if beside is None else agree(name, mean, beside)
            in_range = None if expected is None else expected[0] <= mean <= expected[1]
            found.append(Compared(phase.name, name, mean, min(mine), max(mine), beside, agrees, expected, in_range))
        found += _possible(phase, inner, peak)
    return found


def agree(metric: str, ours: float, theirs: float) -> bool:
    absolute, relative = TOLERANCES.get(metric, (0.0, 0.15))
    return abs(ours - theirs) <= max(absolute, relative * abs(theirs))


def _possible(phase: Phase, ours: Sequence[Reading], peak: float | None) -> Iterator[Compared]:
    """Could the Tensor Cores have done the operations in the time in which they were active? A little of them is done
    elsewhere."""
    active = [r.values["tensor_activity"] for r in ours if "tensor_activity" in r.values]
    if peak is None or not active or not phase.operations:
        return
    done = phase.operations / phase.seconds / 1e12
    most = 1.05 * peak * statistics.fmean(active)
    yield Compared(phase.name, "tflops by Tensor Cores", done, None, None, most, done <= most, None, None)


def _is_inside(phase: Phase, at: float) -> bool:
    return phase.begin + EDGE_S <= at <= phase.end - 0.2


def failures(compared: Sequence[Compared], *, needed: Sequence[str], ranged: bool) -> list[str]:
    """Why the readings are not confirmed. needed: metrics that nvidia-smi must have told. ranged: do ranges count?"""
    wrong = [f"{c.phase}: {c.metric} {c.ours:.4g}, beside {c.theirs:.4g}" for c in compared if c.agrees is False]
    if ranged:
        wrong += [f"{c.phase}: {c.metric} {c.ours:.4g} is out of {c.expected}" for c in compared if c.in_range is False]
    for phase in PHASES:
        told = {c.metric for c in compared if c.phase == phase and c.agrees is not None}
        wrong += [f"{phase}: no second reading of {metric}" for metric in needed if metric not in told]
    return wrong
