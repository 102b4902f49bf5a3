"""The decoder's input: tokens' embeddings and positions', as the residual stream."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

WIDTHS = (384, 512, 768, 1024, 1280)
"""Whisper's."""


def embedding_build(width: int) -> Build:
    return build("embedding.cu", WIDTH=width)


@cache
def _kernel(width: int, device: torch.device) -> Kernel:
    return Kernel(embedding_build(width), "embed", device)


def embed(token_table: Tensor, position_table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """token_table: [n_vocab, d] float16; position_table: [n_ctx, d] float32; tokens, positions: [n] int32, any stride,
    on one GPU → [n, d] float32. A position behind the last counts as the last: a slot whose context is full takes part
    in steps until it is released."""
    n_ctx, width = position_table.shape
    if width not in WIDTHS:
        raise ValueError(f"Whisper models are {', '.join(map(str, WIDTHS))} wide, not {width}")
    if token_table.dtype != torch.float16 or token_table.shape[1] != width or not token_table.is_contiguous():
        raise ValueError(f"token_table must be float16 [n_vocab, {width}], got {list(token_table.shape)}")
    if position_table.dtype != torch.float32 or not position_table.is_contiguous():
        raise ValueError(f"position_table must be float32, not {position_table.dtype}")
    if tokens.dtype != torch.int32 or positions.dtype != torch.int32 or tokens.shape != positions.shape:
        raise ValueError("tokens and positions must be int32 of the same shape")
    n = len(tokens)
    out = torch.empty(n, width, device=tokens.device)
    _kernel(width, tokens.device)(
        n,
        width // 4,
        token_table,
        position_table,
        tokens,
        positions,
        out,
        ctypes.c_int(tokens.stride(0)),
        ctypes.c_int(positions.stride(0)),
        ctypes.c_int(n_ctx),
    )
    return out


def reference(token_table: Tensor, position_table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """The same in plain PyTorch, in any precision."""
    return token_table[tokens].float() + position_table[positions.clamp(max=len(position_table) - 1)]


BUILDS = tuple(map(embedding_build, WIDTHS))
