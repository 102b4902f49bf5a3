"""Linear layers with what follows them beside the library's: ``python -m loadtest.gpu.kernels.linear``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels.linear import linear
from loadtest.gpu.timing import graph_milliseconds

Row = dict[str, object]
Run = Callable[[], object]

LAYERS = {
    "attention in": (3, 1, "bias"),
    "attention out": (1, 1, "residual"),
    "feed-forward in": (4, 1, "gelu"),
    "feed-forward out": (1, 4, "residual"),
}
"""n and k in widths of the model, and what follows the product."""

BYTES_PER_MILLISECOND, FLOP_PER_MILLISECOND = 3.03e9, 752e9
"""An H100's, measured: a copy, and the library's product of 8192 x 8192 matrices."""


def measure(width: int = 1280, windows: tuple[int, ...] = (1, 16, 64), seconds: float = 1.0) -> list[Row]:
    """Milliseconds of each linear layer of an encoder layer, in short bursts and after ``seconds`` without a pause, in
    which a GPU's clocks fall to what its power allows."""
    return [_layer(name, width, count, seconds) for count in windows for name in LAYERS]


def _layer(name: str, width: int, windows: int, seconds: float) -> Row:
    wide, deep, then = LAYERS[name]
    added = then == "residual"
    rows, n, k = windows * 1500, wide * width, deep * width
    x = torch.randn(rows, k, device="cuda").half()
    weight = (torch.randn(n, k, device="cuda") / k**0.5).half()
    bias = torch.randn(n, device="cuda").half()
    out = torch.empty(rows, n, device="cuda", dtype=torch.float16)
    residual = torch.zeros(rows, n, device="cuda") if added else None
    flop = 2 * rows * n * k
    moved = x.nbytes + weight.nbytes + (out.nbytes if residual is None else 2 * residual.nbytes)

    def library() -> object:
        y = F.linear(x, weight, bias)
        return residual.add_(y) if residual is not None else F.gelu(y) if then == "gelu" else y

    runs: dict[str, Run] = {
        "product": lambda: linear(x, weight, bias, out=out),
        "library_product": lambda: torch.addmm(bias, x, weight.t(), out=out),
        "fused": lambda: linear(x, weight, bias, gelu=then == "gelu", residual=residual, out=None if added else out),
        "library": library,
    }  # fmt: skip
    row: Row = {"layer": name, "then": then, "rows": rows, "n": n, "k": k, "flop": flop, "bytes": moved}
    row["bound_milliseconds"] = max(flop / FLOP_PER_MILLISECOND, moved / BYTES_PER_MILLISECOND)
    times = {}
    for run, call in runs.items():
        time.sleep(0.1)
        times[run] = row[f"{run}_milliseconds"] = graph_milliseconds([call] * 4)
    if seconds and rows >= 24000:
        for run, call in runs.items():
            row[f"{run}_sustained_milliseconds"] = _sustained(call, times[run], seconds)
    return row


def _sustained(run: Run, milliseconds: float, seconds: float) -> float:
    """The second half of ``seconds``."""
    times = max(1, int(seconds * 500 / milliseconds))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(times):
        run()
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--seconds", type=float, default=1.0, help="without a pause; 0 leaves that out")
    options = parser.parse_args()
    rows = measure(options.width, seconds=options.seconds)
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
