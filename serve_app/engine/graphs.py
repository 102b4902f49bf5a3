"""CUDA Graphs of a decoding step: hundreds of launches become one, for a few numbers of slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def buckets(most: int) -> list[int]:
    """Numbers of slots that get a graph, ascending, the last being ``most``: a step costs that of the bucket above it,
    so they lie closer than a quarter apart, except for the first few."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        sizes.append(-(-sizes[-1] * 5 // 4 // 4) * 4 if sizes[-1] >= 16 else sizes[-1] + 4)
    return [size for size in sizes if size < most] + [most]


class StepGraphs:
    """Runs ``step(n)`` by replaying its capture for the smallest bucket that holds n.

    All buckets are captured at once, with a trial run of each before: slots must be idle then. What a step reads must
    stay where it is, and slots between n and the bucket must stand the step.
    """

    def __init__(self, step: Callable[[int], None], sizes: Sequence[int]):
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        for size in sorted(sizes, reverse=True):  # the largest first, so that the others find room in its memory
            # libraries choose and load their kernels in a run outside of the capture
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(size)
            pool = graph.pool()
            self._graphs[size] = graph
        self._sizes = sorted(sizes)

    def __call__(self, n: int) -> None:
        self._graphs[next(size for size in self._sizes if size >= n)].replay()
