"""The traffic: windows of mixed lengths that arrive as a Poisson process, whatever the server does (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SHORTEST_S, LONGEST_S = 1.0, 30.0
TOKENS_A_SECOND = 128 / 30
"""Of speech."""
SPREAD = 0.25
"""Of the tokens about their mean: standard deviation of their logarithm."""
MOST_TOKENS = 224
"""Of one window, as in openai-whisper."""


@dataclass(frozen=True, slots=True)
class Window:
    """arrived: seconds from the begin. seconds: of audio. tokens: how many its text has."""

    arrived: float
    seconds: float
    tokens: int


def poisson(rate: float, count: int, seed: int) -> list[Window]:
    """So many windows, ``rate`` of them a second. With one seed another rate gives the same windows, closer together or
    further apart."""
    if rate <= 0 or count < 1:
        raise ValueError(f"a rate is above 0 and there is a window, got {rate} and {count}")
    gaps, seconds, tokens = _drawn(count, seed)
    arrived = (np.cumsum(gaps) / rate).tolist()
    return [Window(*row) for row in zip(arrived, seconds, tokens, strict=True)]


@lru_cache(maxsize=8)
def _drawn(count: int, seed: int) -> tuple[npt.NDArray[np.float64], list[float], list[int]]:
    """Gaps between arrivals, in units of their mean; lengths; tokens."""
    rng = np.random.default_rng(seed)
    gaps, seconds = rng.exponential(size=count), rng.uniform(SHORTEST_S, LONGEST_S, count)
    noise = rng.lognormal(-(SPREAD**2) / 2, SPREAD, count)
    tokens = np.clip(np.rint(TOKENS_A_SECOND * seconds * noise), 1, MOST_TOKENS).astype(int)
    return gaps, seconds.tolist(), tokens.tolist()


def percentile(latencies: list[float], share: float) -> float:
    """Nearest rank; infinite of none."""
    return sorted(latencies)[max(0, math.ceil(share * len(latencies)) - 1)] if latencies else math.inf
