"""What replicas and callers say of themselves, once a second, and what the policy decides from (pure types).

They travel through Ray Serve as dictionaries of numbers (``record_autoscaling_stats``): ``encode`` and ``decode``.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

Stage = str
"""features, encoder or decoder."""

STAGES: tuple[Stage, ...] = ("features", "encoder", "decoder")

API = "api"
"""The deployment whose replicas call the stages."""


@dataclass(frozen=True, slots=True)
class ReplicaReading:
    """One replica over its last second; its queue at the time of the reading.

    at: Unix time. Shares and utilizations are 0 to 1.
    busy: share of the time in which a batch of its ran.
    gpu_share: share of the time in which its work held the GPU, by CUDA events; None on a CPU. Where several processes
        share the GPU, it counts their turns between its own.
    sm_utilization, dram_utilization: of its GPU, whoever used it; None where they cannot be read.
    saturation: the GPU's SM utilization while this stage alone ran full batches (measured at warm-up); 1 on a CPU.
    fill: of its batches' budget, or of the decoder's slots, that was used; 0 where no batch ran.
    queued_windows, queued_s: windows that wait for it here, and the seconds of audio in them. What waits at the callers
        for credit is in their readings.
    oldest_wait_s: how long the first of them has waited; 0 where none waits.
    running_windows: windows in its batch or slots.
    rate: seconds of audio that it does in a second of being busy, smoothed, full batches counting for more than nearly
        empty ones; None before its first batch.
    budget_at_bound: its batches cannot grow any more.
    done_s: seconds of audio that it finishes a second, smoothed over some seconds.
    gpu: the UUID of its GPU, without a prefix; None on a CPU.
    """

    at: float
    busy: float
    gpu_share: float | None
    sm_utilization: float | None
    dram_utilization: float | None
    saturation: float
    fill: float
    queued_windows: int
    queued_s: float
    oldest_wait_s: float
    running_windows: int
    rate: float | None
    budget_at_bound: bool
    done_s: float
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class CallerReading:
    """One API replica at the time of the reading.

    at: Unix time. active: recordings that it works on.
    arrived_s: seconds of audio in the windows that it took to the first stage in the last second; None where that is
        not known.
    For each stage: windows that wait here until a replica takes them, the seconds of audio in them, and how long the
    first has waited (0 where none waits).
    """

    at: float
    active: int
    features_windows: int
    features_s: float
    features_oldest_wait_s: float
    encoder_windows: int
    encoder_s: float
    encoder_oldest_wait_s: float
    decoder_windows: int
    decoder_s: float
    decoder_oldest_wait_s: float
    arrived_s: float | None = None


Reading = TypeVar("Reading", ReplicaReading, CallerReading)


GPU_PARTS = {"gpu_high": 80, "gpu_middle": 32, "gpu_low": 0}
"""A UUID's 128 bits as numbers that a float holds exactly: each from so many bits up to the one before."""


def encode(reading: ReplicaReading | CallerReading) -> dict[str, float]:
    """As numbers alone, which is all that Ray Serve takes: None is NaN, truth is 1 or 0. Raises ValueError where the
    GPU is not named by a UUID."""
    numbers: dict[str, float] = {}
    for field in fields(reading):
        value = getattr(reading, field.name)
        if field.name == "gpu":
            numbers |= _gpu_numbers(value)
        else:
            numbers[field.name] = math.nan if value is None else float(value)
    return numbers


def decode(kind: type[Reading], values: Mapping[str, float]) -> Reading:
    """The reading that was encoded; other keys, such as Serve's own, are ignored. Raises ValueError where something is
    missing, or is NaN that must be known."""
    hints = get_type_hints(kind)
    names: list[str] = [field.name for field in fields(kind) if field.name != "gpu"]
    parts: list[str] = list(GPU_PARTS) if "gpu" in hints else []
    if missing := [name for name in names + parts if name not in values]:
        raise ValueError(f"a {kind.__name__} without {', '.join(missing)}")
    found: dict[str, Any] = {}
    for name in names:
        value = values[name]
        if math.isnan(value):
            if hints[name] != float | None:
                raise ValueError(f"a {kind.__name__} whose {name} is unknown")
            found[name] = None
        else:
            found[name] = hints[name](value) if hints[name] in (int, bool) else float(value)
    if parts:
        found["gpu"] = _gpu_of(values)
    return kind(**found)


def _gpu_numbers(gpu: str | None) -> dict[str, float]:
    if gpu is None:
        return dict.fromkeys(GPU_PARTS, math.nan)
    left, numbers = uuid.UUID(gpu).int, {}
    for name, low in GPU_PARTS.items():
        numbers[name] = float(left >> low)
        left &= (1 << low) - 1
    return numbers


def _gpu_of(values: Mapping[str, float]) -> str | None:
    if any(math.isnan(values[name]) for name in GPU_PARTS):
        return None
    return str(uuid.UUID(int=sum(int(values[name]) << low for name, low in GPU_PARTS.items())))
