"""Bias and GELU beside PyTorch's: ``python -m loadtest.gpu.kernels.gelu``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gelu import bias_gelu
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds, turns

SHAPES = tuple((rows, width) for width in (1536, 5120) for rows in (1, 64, 256, 1500, 24_000, 96_000))


def measure(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Row]:
    """Milliseconds a call; few rows are drawn from memory that the cache does not hold."""
    return [_row(rows, width) for rows, width in shapes]


def _row(rows: int, width: int) -> Row:
    size = rows * width * 4
    inputs = [torch.randn(rows, width, device="cuda", dtype=torch.float16) for _ in range(turns(size))]
    out = [torch.empty_like(x) for x in inputs]
    bias = torch.randn(width, device="cuda", dtype=torch.float16)

    def library(x: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return Row(
        "bias and GELU",
        f"{rows} × {width}",
        graph_milliseconds([partial(bias_gelu, x, bias, y) for x, y in zip(inputs, out, strict=True)]),
        bytes=size,
        library=graph_milliseconds([partial(library, x) for x in inputs]),
        more={"PyTorch's GELU alone, ms": graph_milliseconds([partial(F.gelu, x) for x in inputs])},
    )


if __name__ == "__main__":
    report.main(measure, __doc__)
