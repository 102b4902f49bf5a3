"""The decoder's self-attention of one step, over slots of different lengths."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

HEAD = 64  # numbers of a head, in every Whisper
WIDTHS = (384, 512, 768, 1024, 1280)


def _build(width: int) -> Build:
    return build("self_attention.cu", WIDTH=width, HEADS=width // HEAD)


BUILDS = tuple(map(_build, WIDTHS))


class SelfAttention:
    """The kernel for one width on one GPU."""

    def __init__(self, width: int, device: torch.device):
        if width not in WIDTHS:
            raise ValueError(f"Whisper models are {', '.join(map(str, WIDTHS))} wide, not {width}")
        self.width = width
        self._kernel = Kernel(_build(width), "self_attention", device)

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """qkv: [n, 3 · width] FP16; keys, values: [n, n_ctx, width] FP16, the same slots' caches, to which the new
        positions are added; positions: [n] int32, of the new tokens, any stride; one
        behind the last counts as the last → [n, width]."""
        n, n_ctx = len(qkv), keys.shape[1]
        if qkv.shape != (n, 3 * self.width) or not qkv.is_contiguous() or qkv.dtype != torch.float16:
            raise ValueError(f"qkv must be FP16 [n, {3 * self.width}], got {qkv.dtype} {list(qkv.shape)}")
        for cache in (keys, values):
            if cache.shape != (n, n_ctx, self.width) or not cache.is_contiguous() or cache.dtype != torch.float16:
                raise ValueError(f"a cache must be FP16 [{n}, n_ctx, {self.width}], got {list(cache.shape)}")
        if positions.shape != (n,) or positions.dtype != torch.int32:
            raise ValueError(f"positions must be int32 [{n}], got {positions.dtype} {list(positions.shape)}")
        out = torch.empty(n, self.width, device=qkv.device, dtype=qkv.dtype)
        stride = ctypes.c_int(positions.stride(0))
        self._kernel((n, self.width // HEAD), 128, qkv, keys, values, positions, out, ctypes.c_int(n_ctx), stride)
        return out


def reference(qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The same in plain PyTorch, in any precision."""
    n, width = len(qkv), keys.shape[2]
    positions = positions.clamp(max=keys.shape[1] - 1)
    query, key, value = qkv.chunk(3, dim=-1)
    where = torch.arange(n, device=qkv.device), positions.long()
    keys.index_put_(where, key)
    values.index_put_(where, value)
    length = int(positions.max()) + 1
    visible = torch.arange(length, device=qkv.device) <= positions[:, None]

    def heads(x: Tensor) -> Tensor:
        return x.view(n, -1, width // HEAD, HEAD).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(query), heads(keys[:, :length]), heads(values[:, :length]), attn_mask=visible[:, None, None]
    )
    return mixed.transpose(1, 2).reshape(n, width)
