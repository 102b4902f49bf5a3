"""Timing work on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
CACHE_BYTES = 200e6
"""Several times a GPU's cache: so much memory is gone through before any of it comes again."""


def milliseconds(run: Run, *, repeats: int = 20) -> float:
    """Median time of one run, from when the GPU could begin it until it has done all of it: with the GPU's waits for
    the host, where it has to wait."""
    return statistics.median([_between(run) for _ in range(3 + repeats)][3:])


def graph_milliseconds(runs: Sequence[Run], *, repeats: int = 20) -> float:
    """Median time of one of ``runs``, which do the same work on different memory, so that caches do not flatter it.

    All of them are captured in one CUDA Graph, which takes the host's launches out of the figure.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return milliseconds(graph.replay, repeats=repeats) / len(runs)


def sustained_milliseconds(run: Run, alone: float, seconds: float) -> float:
    """Mean time of a run without a pause between runs, in the second half of ``seconds``: a GPU's clocks fall to what
    its power allows. alone: about how many milliseconds a run takes."""
    times = max(1, int(seconds * 500 / alone))

    def half() -> None:
        for _ in range(times):
            run()

    half()
    return _between(half) / times


def turns(size: int, *, most: int = 16) -> int:
    """How many sets of memory take turns, so that what a call goes through, ``size`` bytes, has left the GPU's cache
    when it comes again."""
    return max(2, min(most, int(CACHE_BYTES / size)))


def _between(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
