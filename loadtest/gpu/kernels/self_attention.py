"""The decoder's self-attention beside PyTorch's over padded caches::

python -m loadtest.gpu.kernels.self_attention
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.self_attention import HEAD, SelfAttention
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds, turns

CONTEXT = 448
SIZES = (1, 8, 64, 256)
POSITIONS = {"at 64": (64, 64), "at 223": (223, 223), "at 0 to 223": (0, 223)}
"""Of the slots' new tokens, evenly spread: the middle of 128 tokens, the last that can be sampled, slots refilled at
different times."""


def measure(width: int = 1280, sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Milliseconds a layer, for several numbers of slots. The caches of other layers drive a layer's out of the GPU's,
    so several sets take turns."""
    return [_row(width, n, name) for n in sizes for name, (first, last) in POSITIONS.items() if n > 1 or first == last]


def _row(width: int, n: int, name: str) -> Row:
    device = torch.device("cuda")
    positions = torch.linspace(*POSITIONS[name], n, device=device).int()
    longest = int(positions.max()) + 1
    visible = int((positions + 1).sum())
    size = (2 * visible * width + 4 * n * width) * 2  # keys and values, and in and out
    sets = turns(size, most=256)
    keys, values = (torch.randn(sets, n, CONTEXT, width, device=device, dtype=torch.float16) for _ in range(2))
    qkv = torch.randn(n, 3 * width, device=device).half()
    attend = SelfAttention(width, device)
    where = torch.arange(n, device=device), positions.long()
    mask = (torch.arange(CONTEXT, device=device) <= positions[:, None])[:, None, None]

    def library(i: int, length: int) -> Tensor:
        """Over the first ``length`` positions of the caches."""
        query, key, value = qkv.chunk(3, dim=-1)
        keys[i].index_put_(where, key)
        values[i].index_put_(where, value)
        mixed = F.scaled_dot_product_attention(
            _heads(query[:, None]),
            _heads(keys[i, :, :length]),
            _heads(values[i, :, :length]),
            attn_mask=mask[..., :length],
        )
        return mixed.transpose(1, 2).reshape(n, width)

    def fused(i: int) -> Tensor:
        return attend(qkv, keys[i], values[i], positions)

    return Row(
        f"decoder self-attention {name}",
        f"{n} × {width}",
        graph_milliseconds([partial(fused, i) for i in range(sets)]),
        bytes=size,
        library=graph_milliseconds([partial(library, i, CONTEXT) for i in range(sets)]),
        more={
            "PyTorch, cut to the longest slot, ms": graph_milliseconds(
                [partial(library, i, longest) for i in range(sets)]
            )
        },
    )


def _heads(x: Tensor) -> Tensor:
    """[n, positions, width] → [n, heads, positions, 64]"""
    return x.view(*x.shape[:2], -1, HEAD).transpose(1, 2)


if __name__ == "__main__":
    report.main(measure, __doc__)
