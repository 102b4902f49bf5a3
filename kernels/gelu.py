"""Bias and GELU in one pass over memory."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

THREADS = 256
BUILDS: tuple[Build, ...] = (build("gelu.cu"),)


@cache
def _kernel(device: torch.device) -> Kernel:
    return Kernel(BUILDS[0], "bias_gelu", device)


def bias_gelu(x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """GELU of x + bias, x Φ(x), right to FP16's last place.

    x: [..., n] float16, n a multiple of 8; bias: [n] float16; out, the result: like x, and may be x. All contiguous on
    one GPU. NaN stays NaN, infinities become it.
    """
    width = x.shape[-1]
    if out is None:
        out = torch.empty_like(x)
    for name, tensor, shape in (("x", x, x.shape), ("bias", bias, (width,)), ("out", out, x.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != torch.float16 or not tensor.is_contiguous() or not tensor.is_cuda:
            raise ValueError(
                f"{name} must be {list(shape)} float16, contiguous, on a GPU, got {list(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} lies on {tensor.device}, x on {x.device}")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")
    if width % 8 or x.numel() >= 2**32:
        raise ValueError(f"x must have a multiple of 8 columns and less than 2³² numbers, not {list(x.shape)}")
    vectors = x.numel() // 8
    if vectors:
        _kernel(x.device)(
            -(-vectors // THREADS), THREADS, x, bias, out, ctypes.c_uint(vectors), ctypes.c_uint(width // 8)
        )
    return out


def reference(x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch, with float32 arithmetic inside."""
    total = x.float() if bias is None else x.float() + bias.float()
    result = torch.nn.functional.gelu(total).to(x.dtype)
    return result if out is None else out.copy_(result)
