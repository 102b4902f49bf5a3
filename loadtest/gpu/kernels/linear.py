"""Linear layers with what follows them beside the library's: ``python -m loadtest.gpu.kernels.linear``."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import linear
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Rates, Row
from loadtest.gpu.timing import Run, graph_milliseconds, sustained_milliseconds

LAYERS = {
    "attention in": (3, 1, "bias"),
    "attention out": (1, 1, "residual"),
    "feed-forward in": (4, 1, "gelu"),
    "feed-forward out": (1, 4, "residual"),
}
"""n and k in widths of the model, and what follows the product."""

MANY_ROWS = 24_000
"""With fewer no GPU is kept busy for long."""


def measure(width: int = 1280, windows: tuple[int, ...] = (1, 16, 64), seconds: float = 1.0) -> list[Row]:
    """Milliseconds of each linear layer of an encoder layer, the product alone and with what follows, in short bursts
    and after ``seconds`` without a pause, in which a GPU's clocks fall to what its power allows."""
    return [row for count in windows for name in LAYERS for row in _layer(name, width, count, seconds)]


def _layer(name: str, width: int, windows: int, seconds: float) -> list[Row]:
    wide, deep, then = LAYERS[name]
    added = then == "residual"
    rows, n, k = windows * 1500, wide * width, deep * width
    x = torch.randn(rows, k, device="cuda").half()
    weight = (torch.randn(n, k, device="cuda") / k**0.5).half()
    bias = torch.randn(n, device="cuda").half()
    out = torch.empty(rows, n, device="cuda", dtype=torch.float16)
    residual = torch.zeros(rows, n, device="cuda") if added else None
    moved = x.nbytes + weight.nbytes

    def library() -> Tensor:
        y = F.linear(x, weight, bias)
        return residual.add_(y) if residual is not None else F.gelu(y) if then == "gelu" else y

    def row(what: str, ours: Run, theirs: Run, moved: int) -> Row:
        time.sleep(0.1)
        alone, library = graph_milliseconds([ours] * 4), graph_milliseconds([theirs] * 4)
        more = {}
        if seconds and rows >= MANY_ROWS:
            more["sustained, ms"] = sustained_milliseconds(ours, alone, seconds)
            more["library sustained, ms"] = sustained_milliseconds(theirs, library, seconds)
        return Row(f"{name}, {what}", f"{rows} × {n} × {k}", alone, moved, 2 * rows * n * k, library, more)

    return [
        row(
            "product",
            lambda: linear(x, weight, bias, out=out),
            lambda: torch.addmm(bias, x, weight.t(), out=out),
            moved + out.nbytes,
        ),
        row(
            then,
            lambda: linear(x, weight, bias, gelu=then == "gelu", residual=residual, out=None if added else out),
            library,
            moved + (out.nbytes if residual is None else 2 * residual.nbytes),
        ),
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--seconds", type=float, default=1.0, help="without a pause; 0 leaves that out")
    options = parser.parse_args()
    rates = Rates.measured()
    report.publish(measure(options.width, seconds=options.seconds), rates, options)


if __name__ == "__main__":
    main()
