"""Timing work on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_milliseconds(runs: Sequence[Callable[[], object]], *, repeats: int = 20) -> float:
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
    times: list[float] = []
    for _ in range(3 + repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(runs))
    return statistics.median(times[3:])
