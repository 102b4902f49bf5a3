"""Latent cross-attention beside attention over ready keys and values: ``python -m loadtest.gpu.kernels.latent_attention``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.latent_attention import HEADS, POSITIONS, LatentAttention, Shape, quantise
from loadtest.gpu.timing import graph_milliseconds

LAYERS_IN_A_GRAPH = 4
Row = dict[str, object]


def measure(width: int = 1280, sizes: tuple[int, ...] = (1, 8, 32, 64, 128, 256)) -> list[Row]:
    """Milliseconds a layer and bytes a second, for several numbers of windows."""
    rows: list[Row] = []
    for windows in sizes:
        # few windows fit in the GPU's cache: then several sets take turns, as nothing of a set outlives 32 layers' weights
        sets = max(1, 200 // windows) if windows < 32 else 1
        rows += [_latent(width, windows, sets, bits, cut) for bits, cut in VARIANTS]
        rows.append(_ready(width, windows, sets))
    return rows


VARIANTS: tuple[tuple[int, Shape | None], ...] = ((16, None), (8, None))


def _latent(width: int, windows: int, sets: int, bits: int, cut: Shape | None) -> Row:
    device = torch.device("cuda")
    kernel = LatentAttention(width, device, bits=bits, cut=cut)
    states = torch.randn(sets * windows, POSITIONS, width, device=device, dtype=torch.float16)
    scales = None
    if bits == 8:
        parts = [quantise(part) for part in states.split(64)]
        states, scales = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        del parts
    queries = torch.randn(windows, HEADS[width], width, device=device, dtype=torch.float16) / width**0.5
    out = torch.empty_like(queries)

    def run(first: int) -> Callable[[], None]:
        rows = slice(first, first + windows)
        return lambda: kernel(queries, states[rows], out, scales=None if scales is None else scales[rows])

    calls = [run(i * windows) for i in range(sets)] * max(1, LAYERS_IN_A_GRAPH // sets)
    milliseconds = graph_milliseconds(calls)
    size = states[:windows].nbytes + (0 if scales is None else scales[:windows].nbytes)
    return {
        "kernel": f"latent, {bits} bits",
        "cut": str(kernel.cut),
        "width": width,
        "windows": windows,
        "milliseconds": milliseconds,
        "terabytes_per_second": size / milliseconds / 1e9,
    }


def _ready(width: int, windows: int, sets: int) -> Row:
    """PyTorch's attention over keys and values projected beforehand: twice the bytes in a layer, 64 times in all."""
    shape = (sets * windows, HEADS[width], POSITIONS, 64)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
    queries = torch.randn(windows, HEADS[width], 1, 64, device="cuda", dtype=torch.float16)

    def run(first: int) -> Callable[[], object]:
        rows = slice(first, first + windows)
        return lambda: F.scaled_dot_product_attention(queries, keys[rows], values[rows])

    calls = [run(i * windows) for i in range(sets)] * max(1, LAYERS_IN_A_GRAPH // sets)
    milliseconds = graph_milliseconds(calls)
    return {
        "kernel": "ready keys and values (SDPA)",
        "width": width,
        "windows": windows,
        "milliseconds": milliseconds,
        "terabytes_per_second": 2 * keys[:windows].nbytes / milliseconds / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--width", type=int, default=1280, choices=list(HEADS))
    options = parser.parse_args()
    rows = measure(options.width)
    for row in rows:
        print(row)
    if options.json:
        with open(options.json, "w") as file:  # noqa: PTH123
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
