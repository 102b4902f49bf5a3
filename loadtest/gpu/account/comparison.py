"""What every comparison has: two ways of the same work, where it runs, and how its time is taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from loadtest.gpu.engine import Engine
from loadtest.gpu.timing import milliseconds
from loadtest.gpu.work import random_weights
from serve_app.engine.checkpoint import Dims


class NotMeasured(Exception):
    """A part has no figure here; the message says why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same work done in two ways. ``ours`` and ``other`` are in ``unit``; the larger is the better one where
    ``more_is_better``. goal: at least so many times as good."""

    part: str
    what: str
    beside: str
    unit: str
    ours: float
    other: float
    goal: float | None = None
    more_is_better: bool = False

    @property
    def times(self) -> float:
        return self.ours / self.other if self.more_is_better else self.other / self.ours

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.times >= self.goal


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured where. windows: together, in the comparison of precisions. seconds: for each of its systems."""

    dims: Dims
    device: str
    windows: int
    seconds: float


def need_gpu(setting: Setting) -> None:
    if setting.device != "cuda":
        raise NotMeasured("needs an NVIDIA GPU")


@lru_cache(maxsize=1)
def engine_of(setting: Setting) -> Engine:
    device = torch.device(setting.device)
    engine = Engine()
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    engine.load(setting.dims, random_weights(setting.dims, device, dtype), device)
    return engine


def host_milliseconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])


def stream_milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """With the host's launches, where the GPU waits for them."""
    return milliseconds(work) if device.type == "cuda" else host_milliseconds(work, 5)
