"""Residual sum and layer normalisation in one pass over memory."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

WIDTHS = (384, 512, 768, 1024, 1280)
"""Whisper's."""
EPSILON = 1e-5
MANY_ROWS = 8
"""Rows of a block where a warp takes a row."""
FEW_VECTORS = 1
"""Vectors of four numbers that a lane holds where a block takes a row."""
FEW = 512
"""Up to so many rows a block takes a row."""


def layer_norm_build(width: int, many_rows: int = MANY_ROWS, few_vectors: int = FEW_VECTORS) -> Build:
    return build("layer_norm.cu", DIM=width, MANY_ROWS=many_rows, FEW_VECTORS=few_vectors)


@cache
def _kernel(width: int, few: bool, device: torch.device) -> Kernel:
    return Kernel(layer_norm_build(width), "add_layer_norm_few" if few else "add_layer_norm", device)


def add_layer_norm(
    residual: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    y_bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds ``y`` and ``y_bias`` to ``residual`` in place, and returns the layer-normalised sum.

    residual: [..., d] float32; y: [..., d] float16, or None for the normalisation alone; weight, bias: [d] float32;
    y_bias: [d] float16, only with a y; out, the result: [..., d] float16. All contiguous on one GPU; d is a width of
    Whisper's.
    """
    width = residual.shape[-1]
    if width not in WIDTHS:
        raise ValueError(f"Whisper models are {', '.join(map(str, WIDTHS))} wide, not {width}")
    if y is None and y_bias is not None:
        raise ValueError("y_bias goes with a y")
    if out is None:
        out = torch.empty_like(residual, dtype=torch.float16)
    _check("residual", residual, residual.shape, torch.float32, residual.device)
    _check("out", out, residual.shape, torch.float16, residual.device)
    _check("weight", weight, (width,), torch.float32, residual.device)
    _check("bias", bias, (width,), torch.float32, residual.device)
    if y is not None:
        _check("y", y, residual.shape, torch.float16, residual.device)
    if y_bias is not None:
        _check("y_bias", y_bias, (width,), torch.float16, residual.device)
    rows = residual.numel() // width
    if rows:
        few = rows <= FEW
        grid, block = (rows, width // 4 // FEW_VECTORS) if few else (-(-rows // MANY_ROWS), 32 * MANY_ROWS)
        arguments = (residual, y, y_bias, weight, bias, out, ctypes.c_int(rows), ctypes.c_float(EPSILON))
        _kernel(width, few, residual.device)(grid, block, *arguments)
    return out


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cuda:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype}, contiguous and on a GPU, not {list(tensor.shape)} {tensor.dtype}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, residual on {device}")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} must begin at a multiple of 16 bytes")


def reference(
    residual: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    y_bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in the residual's precision."""
    if y is not None:
        residual += y
        if y_bias is not None:
            residual += y_bias
    kind = residual.dtype
    normalised = torch.nn.functional.layer_norm(residual, residual.shape[-1:], weight.to(kind), bias.to(kind), EPSILON)
    result = normalised if kind == torch.float64 else normalised.half()
    return result if out is None else out.copy_(result)


BUILDS = tuple(layer_norm_build(width) for width in WIDTHS)
