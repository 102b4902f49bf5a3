"""Residual sum and layer normalisation beside PyTorch's: ``python -m loadtest.gpu.kernels.layer_norm``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels.layer_norm import EPSILON, WIDTHS, add_layer_norm
from loadtest.gpu.timing import graph_milliseconds

Row = dict[str, object]
BANDWIDTH = 3.0e12
"""Bytes a second of a device copy on an H100."""
ROWS = (1, 8, 64, 256, 1024, 1500, 4096, 24_000, 96_000)
CACHE_BYTES = 200e6
"""Several times a GPU's cache: so much memory is gone through before any of it comes again."""


def measure(widths: tuple[int, ...] = WIDTHS, counts: tuple[int, ...] = ROWS) -> list[Row]:
    """Milliseconds a call; few rows are drawn from memory that the cache does not hold."""
    return [_row(width, rows) for width in widths for rows in counts]


def _row(width: int, rows: int) -> Row:
    size = rows * width * (4 + 4 + 2 + 2)
    sets = min(16, max(1, int(CACHE_BYTES / size)))
    residuals = [torch.randn(rows, width, device="cuda") for _ in range(sets)]
    given = [torch.randn(rows, width, device="cuda", dtype=torch.float16) for _ in range(sets)]
    out = [torch.empty_like(y) for y in given]
    weight, bias = torch.randn(width, device="cuda"), torch.randn(width, device="cuda")
    half_weight, half_bias = weight.half(), bias.half()
    half_residuals = [r.half() for r in residuals]

    def fused(i: int) -> None:
        add_layer_norm(residuals[i], given[i], weight, bias, out=out[i])

    def library(i: int) -> None:
        residuals[i].add_(given[i])
        F.layer_norm(residuals[i], (width,), weight, bias, EPSILON).half()

    def library_half(i: int) -> None:
        F.layer_norm(half_residuals[i].add_(given[i]), (width,), half_weight, half_bias, EPSILON)

    milliseconds = graph_milliseconds([lambda i=i: fused(i) for i in range(sets)])  # type: ignore[misc]
    return {
        "name": "add and layer norm",
        "width": width,
        "rows": rows,
        "milliseconds": milliseconds,
        "bytes": size,
        "of_bound": size / BANDWIDTH * 1e3 / milliseconds,
        "pytorch_milliseconds": graph_milliseconds([lambda i=i: library(i) for i in range(sets)]),  # type: ignore[misc]
        "pytorch_all_fp16_milliseconds": graph_milliseconds(
            [lambda i=i: library_half(i) for i in range(sets)]  # type: ignore[misc]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = measure()
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
