"""CUDA Graphs: hundreds of launches become one, for a few sizes of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def buckets(most: int) -> list[int]:
    """Numbers of slots that get a graph, ascending, the last being ``most``: a step costs that of the bucket above it,
    so they lie at most a quarter apart, except for the first few. Powers of two are among them."""
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(4, octave // 4))
    return [size for size in sizes if size < most] + [most]


class SizedGraphs:
    """Runs ``work(n)`` by replaying its capture for the smallest size that holds n.

    All sizes are captured at once, with a trial run of each before. What the work reads and writes must stay where it
    is; what stands between n and the size is worked on too.
    """

    def __init__(self, work: Callable[[int], None], sizes: Sequence[int]):
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        for size in sorted(sizes, reverse=True):  # the largest first, so that the others find room in its memory
            # libraries choose and load their kernels in a run outside of the capture
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                work(size)
            pool = graph.pool()
            self._graphs[size] = graph
        self._sizes = sorted(sizes)

    def __call__(self, n: int) -> None:
        self._graphs[next(size for size in self._sizes if size >= n)].replay()
