"""The encoder's self-attention beside PyTorch's: ``python -m loadtest.gpu.kernels.encoder_attention``.

The plain variants are slow, so they and NumPy run a tiny shape. How many sectors of global memory those two read:

    ncu --metrics l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,lts__t_sectors_op_read.sum \\
        -k encoder_attention_simple python -m loadtest.gpu.kernels.encoder_attention --plain-only
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.encoder_attention import (
    SIMPLE_VARIANTS,
    encoder_attention,
    portable_attention,
    reference,
    simple_attention,
)
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Rates, Row
from loadtest.gpu.timing import graph_milliseconds, turns

SHAPES = ((1, 20), (2, 20), (4, 20), (16, 20), (64, 20), (16, 6), (16, 8), (16, 12), (16, 16))
"""Windows and heads."""
TINY = (1, 64, 6)


def measure(shapes: tuple[tuple[int, int], ...] = SHAPES, positions: int = 1500) -> list[Row]:
    """Milliseconds a call of each kernel, and of PyTorch's attention by its own choice and by two named backends; then
    the plain variants."""
    return [row for batch, heads in shapes for row in _rows(batch, positions, heads)] + _plain()


def _rows(batch: int, positions: int, heads: int) -> list[Row]:
    moved = batch * positions * heads * 64 * 2 * 4
    given = [_projections(batch, positions, heads) for _ in range(turns(moved))]
    out = torch.empty(batch, positions, heads * 64, dtype=torch.float16, device="cuda")

    def library(qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))

    def timed(run: Callable[[Tensor], Tensor]) -> float:
        return graph_milliseconds([partial(run, x) for x in given])

    chosen, named = timed(library), {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            named[f"PyTorch's {name}, ms"] = timed(library)
    return [
        Row(
            kernel.__name__,
            _shape(batch, positions, heads),
            timed(partial(kernel, heads=heads, out=out)),
            bytes=moved,
            flop=4 * batch * heads * positions**2 * 64,
            library=chosen,
            more=named,
        )
        for kernel in (encoder_attention, portable_attention)
    ]


def _plain() -> list[Row]:
    """The two plain variants and NumPy on a tiny shape, and the plain ones on one window of the tiny model."""
    qkv, window = _projections(*TINY), _projections(1, 1500, 6)
    rows: list[Row] = []
    for variant in SIMPLE_VARIANTS:
        for given in (qkv, window):
            milliseconds = graph_milliseconds([partial(simple_attention, given, given.shape[3], variant)])
            rows.append(Row(variant, _shape(given.shape[0], given.shape[1], given.shape[3]), milliseconds))
    array = qkv.cpu().numpy().astype(np.float32)
    return [*rows, Row("NumPy", _shape(*TINY), _host_milliseconds(array))]


def _shape(batch: int, positions: int, heads: int) -> str:
    return f"{batch} × {positions} × {heads} × 64"


def _host_milliseconds(qkv: np.ndarray) -> float:
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / 8
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        _ = weights @ v / weights.sum(-1, keepdims=True)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def _projections(batch: int, positions: int, heads: int) -> Tensor:
    return torch.randn(batch, positions, 3, heads, 64, device="cuda").half()


def _launch_plain() -> None:
    """One launch of each plain variant, checked, for a profiler."""
    qkv = _projections(1, 1500, 6)
    want = reference(qkv.float(), 6)
    for variant in SIMPLE_VARIANTS:
        got = simple_attention(qkv, 6, variant)
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--plain-only", action="store_true", help="launch the two plain variants once, for ncu")
    options = parser.parse_args()
    if options.plain_only:
        _launch_plain()
    else:
        rates = Rates.measured()
        report.publish(measure(), rates, options)


if __name__ == "__main__":
    main()
