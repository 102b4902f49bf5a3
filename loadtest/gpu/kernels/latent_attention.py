"""Latent cross-attention beside PyTorch's attention over ready keys and values::

python -m loadtest.gpu.kernels.latent_attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from kernels.latent_attention import HEADS, POSITIONS, LatentAttention, quantise
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Rates, Row
from loadtest.gpu.timing import Run, graph_milliseconds, turns

LAYERS_IN_A_GRAPH = 4
SIZES = (1, 8, 32, 64, 128, 256)


def measure(width: int = 1280, sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Milliseconds a layer, for several numbers of windows. Nothing of a window's state outlives a step of the other
    layers in the GPU's cache, so several sets take turns."""
    rows: list[Row] = []
    for windows in sizes:
        ready = _ready(width, windows)
        rows += [_latent(width, windows, bits, ready.milliseconds) for bits in (16, 8)]
        rows.append(ready)
    return rows


def _latent(width: int, windows: int, bits: int, ready: float) -> Row:
    device = torch.device("cuda")
    kernel = LatentAttention(width, device, bits=bits)
    sets = _sets(width, windows)
    states = torch.randn(sets * windows, POSITIONS, width, device=device, dtype=torch.float16)
    scales = None
    if bits == 8:
        parts = [quantise(part) for part in states.split(64)]
        states, scales = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        del parts
    queries = torch.randn(windows, HEADS[width], width, device=device, dtype=torch.float16) / width**0.5
    out = torch.empty_like(queries)

    def run(i: int) -> None:
        rows = slice(i * windows, (i + 1) * windows)
        kernel(queries, states[rows], out, scales=None if scales is None else scales[rows])

    return Row(
        f"latent, {bits} bits",
        f"{windows} × {POSITIONS} × {width}",
        graph_milliseconds(_layers(run, sets)),
        bytes=states[:windows].nbytes + (0 if scales is None else scales[:windows].nbytes),
        flop=4 * windows * HEADS[width] * POSITIONS * width,
        library=ready,
    )


def _ready(width: int, windows: int) -> Row:
    """PyTorch's attention over keys and values projected beforehand: twice the bytes in a layer, 64 times in all."""
    sets = _sets(width, windows)
    shape = (sets * windows, HEADS[width], POSITIONS, 64)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
    queries = torch.randn(windows, HEADS[width], 1, 64, device="cuda", dtype=torch.float16)

    def run(i: int) -> None:
        rows = slice(i * windows, (i + 1) * windows)
        F.scaled_dot_product_attention(queries, keys[rows], values[rows])

    return Row(
        "ready keys and values (PyTorch)",
        f"{windows} × {POSITIONS} × {width}",
        graph_milliseconds(_layers(run, sets)),
        bytes=2 * keys[:windows].nbytes,
    )


def _sets(width: int, windows: int) -> int:
    return turns(windows * POSITIONS * width * 2, most=64)


def _layers(run: Callable[[int], None], sets: int) -> Sequence[Run]:
    return [partial(run, i) for i in range(sets)] * max(1, LAYERS_IN_A_GRAPH // sets)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--width", type=int, default=1280, choices=list(HEADS))
    options = parser.parse_args()
    rates = Rates.measured()
    report.publish(measure(options.width), rates, options)


if __name__ == "__main__":
    main()
