"""Residual sum and layer normalisation beside PyTorch's: ``python -m loadtest.gpu.kernels.layer_norm``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_norm import EPSILON, WIDTHS, add_layer_norm
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds, turns

ROWS = (1, 8, 64, 256, 1024, 1500, 4096, 24_000, 96_000)


def measure(widths: tuple[int, ...] = WIDTHS, counts: tuple[int, ...] = ROWS) -> list[Row]:
    """Milliseconds a call; few rows are drawn from memory that the cache does not hold."""
    return [_row(width, rows) for width in widths for rows in counts]


def _row(width: int, rows: int) -> Row:
    size = rows * width * (4 + 4 + 2 + 2)
    sets = range(turns(size))
    residuals = [torch.randn(rows, width, device="cuda") for _ in sets]
    given = [torch.randn(rows, width, device="cuda", dtype=torch.float16) for _ in sets]
    out = [torch.empty_like(y) for y in given]
    weight, bias = torch.randn(width, device="cuda"), torch.randn(width, device="cuda")
    half_weight, half_bias = weight.half(), bias.half()
    half_residuals = [r.half() for r in residuals]

    def fused(i: int) -> Tensor:
        return add_layer_norm(residuals[i], given[i], weight, bias, out=out[i])

    def library(i: int) -> Tensor:
        residuals[i].add_(given[i])
        return F.layer_norm(residuals[i], (width,), weight, bias, EPSILON).half()

    def library_half(i: int) -> Tensor:
        return F.layer_norm(half_residuals[i].add_(given[i]), (width,), half_weight, half_bias, EPSILON)

    return Row(
        "add and layer norm",
        f"{rows} × {width}",
        graph_milliseconds([partial(fused, i) for i in sets]),
        bytes=size,
        library=graph_milliseconds([partial(library, i) for i in sets]),
        more={"PyTorch, all in FP16, ms": graph_milliseconds([partial(library_half, i) for i in sets])},
    )


if __name__ == "__main__":
    report.main(measure, __doc__)
