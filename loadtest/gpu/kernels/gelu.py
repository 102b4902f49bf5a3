"""Bias and GELU beside PyTorch's: ``python -m loadtest.gpu.kernels.gelu``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels.gelu import bias_gelu
from loadtest.gpu.timing import graph_milliseconds

Row = dict[str, object]
BANDWIDTH = 3.0e12
"""Bytes a second of a device copy on an H100."""
SHAPES = tuple((rows, width) for width in (1536, 5120) for rows in (1, 64, 256, 1500, 24_000, 96_000))
CACHE_BYTES = 200e6


def measure(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Row]:
    """Milliseconds a call; few rows are drawn from memory that the cache does not hold."""
    return [_row(rows, width) for rows, width in shapes]


def _row(rows: int, width: int) -> Row:
    size = rows * width * 4
    sets = min(16, max(1, int(CACHE_BYTES / size)))
    inputs = [torch.randn(rows, width, device="cuda", dtype=torch.float16) for _ in range(sets)]
    out = [torch.empty_like(x) for x in inputs]
    bias = torch.randn(width, device="cuda", dtype=torch.float16)
    milliseconds = graph_milliseconds(
        [lambda i=i: bias_gelu(inputs[i], bias, out[i]) for i in range(sets)]  # type: ignore[misc]
    )
    return {
        "name": "bias and GELU",
        "rows": rows,
        "width": width,
        "milliseconds": milliseconds,
        "bytes": size,
        "of_bound": size / BANDWIDTH * 1e3 / milliseconds,
        "pytorch_milliseconds": graph_milliseconds([lambda x=x: F.gelu(x + bias) for x in inputs]),  # type: ignore[misc]
        "pytorch_gelu_alone_milliseconds": graph_milliseconds([lambda x=x: F.gelu(x) for x in inputs]),  # type: ignore[misc]
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
