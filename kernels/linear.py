"""Linear layers on Hopper, with what follows them in Whisper's encoder done on the way out: bias, GELU, residual sum.

``kernels/cuda/linear_sm90.cu`` says how. Elsewhere the library serves, with kernels of their own for what follows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.compile import Build, build
from kernels.launch import Kernel, tensor_map

ARCHITECTURE = "sm_90a"
THREADS = 3 * 128
DEPTH = 64
"""Columns of x and weight in a stage: the 128-byte rows that the copy engine swizzles."""
SLAB_BYTES = 16 * 128
"""What a warp sends at once."""
SHARED_LIMIT = 227 * 1024
OUT_HALF, OUT_GELU, OUT_RESIDUAL = 0, 1, 2
"""The kernel's ways out, as its source numbers them."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up: macros of the kernel, where they are explained."""

    pingpong: bool
    group_rows: int
    tile_n: int
    stages: int
    slabs: int
    cluster: int

    @property
    def tile_m(self) -> int:
        return self.group_rows if self.pingpong else 2 * self.group_rows

    @property
    def shared_bytes(self) -> int:
        stage = (self.tile_m + self.tile_n) * DEPTH * 2
        alignment, barriers = 1024, 2 * 8 * self.stages + 2 * 8
        return alignment + self.stages * stage + 8 * self.slabs * SLAB_BYTES + barriers

    def clusters(self, rows: int, n: int) -> int:
        """Clusters' tiles that cover y [rows, n]."""
        return -(-rows // (self.tile_m * self.cluster)) * -(-n // self.tile_n)

    def build(self, out: int) -> Build:
        return build(
            "linear_sm90.cu",
            (ARCHITECTURE,),
            OUT=out,
            PINGPONG=int(self.pingpong),
            GROUP_ROWS=self.group_rows,
            TILE_N=self.tile_n,
            STAGES=self.stages,
            SLABS=self.slabs,
            CLUSTER=self.cluster,
        )


NARROW = Tiling(pingpong=True, group_rows=128, tile_n=128, stages=6, slabs=2, cluster=1)
"""128 × 128, one warpgroup multiplying while the other sends."""
NARROW_FLOATS = Tiling(pingpong=True, group_rows=128, tile_n=128, stages=5, slabs=4, cluster=1)
"""The same, with a stage less and more room for what is sent: twice the bytes."""
WIDE = Tiling(pingpong=False, group_rows=64, tile_n=256, stages=4, slabs=2, cluster=2)
"""128 × 256, half by each warpgroup: fewer bytes from L2, so that sums that pass through L2 leave it less behind."""

BUILDS = (NARROW.build(OUT_HALF), NARROW.build(OUT_GELU), NARROW_FLOATS.build(OUT_RESIDUAL), WIDE.build(OUT_RESIDUAL))


def available(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def plan(rows: int, n: int, k: int, out: int, processors: int) -> Tiling:
    """The tiling that was fastest on an H100 for the shapes of Whisper's models, 1 to 64 windows."""
    if out != OUT_RESIDUAL:
        return NARROW
    wide_blocks = WIDE.cluster * WIDE.clusters(rows, n)
    return WIDE if k >= 4096 and wide_blocks > processors // 2 else NARROW_FLOATS


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias, summed in FP32, then one of

    - y in FP16, to ``out`` or a new tensor;
    - GELU(y), the exact one (by the error function, to 1.4e-5), in FP16 likewise, where ``gelu``;
    - residual += y in FP32, in place, where there is a ``residual``, which is returned.

    x: [..., k] float16; weight: [n, k] float16; bias: [n] float16 or None; residual: [..., n] float32; out: [..., n]
    float16. All contiguous and 16-byte aligned on one Hopper GPU; k and n are multiples of 64. ValueError for others.
    Deterministic. The copy engine is told their addresses at the launch, so a replay of a CUDA Graph needs the same.
    """
    _check(x, weight, bias, gelu, residual, out)
    n, k = weight.shape
    rows = x.numel() // k
    if residual is not None:
        way, target = OUT_RESIDUAL, residual
    else:
        way = OUT_GELU if gelu else OUT_HALF
        target = torch.empty(*x.shape[:-1], n, dtype=torch.float16, device=x.device) if out is None else out
    if rows:
        processors = _processors(x.device)
        tiling = plan(rows, n, k, way, processors)
        _kernel(tiling, way, x.device)(
            min(processors // tiling.cluster, tiling.clusters(rows, n)),
            THREADS,
            tensor_map(x, (tiling.tile_m, DEPTH), (rows, k)),
            tensor_map(weight, (tiling.tile_n // tiling.cluster, DEPTH)),
            tensor_map(target, (16, 128 // target.element_size()), (rows, n)),
            bias,
            ctypes.c_int(rows),
            ctypes.c_int(n),
            ctypes.c_int(k),
            cluster=None if tiling.cluster == 1 else tiling.cluster,
        )
    return target


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in the precision of what it is given."""
    y = functional.linear(x, weight, bias)
    if residual is not None:
        return residual.add_(y)
    if gelu:
        y = functional.gelu(y)
    return y if out is None else out.copy_(y)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None, out: Tensor | None
) -> None:
    if weight.ndim != 2 or any(size == 0 or size % 64 for size in weight.shape):
        raise ValueError(f"weight must be [n, k], multiples of 64, not {tuple(weight.shape)}")
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for this weight, not {tuple(x.shape)}")
    if residual is not None and (gelu or out is not None):
        raise ValueError("a residual is the result: it goes neither with gelu nor with out")
    result = (*x.shape[:-1], n)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "x": (x, tuple(x.shape), torch.float16),
        "weight": (weight, (n, k), torch.float16),
        "bias": (bias, (n,), torch.float16),
        "residual": (residual, result, torch.float32),
        "out": (out, result, torch.float16),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {dtype} on {x.device}, "
                f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must be aligned to 16 bytes")


@cache
def _kernel(tiling: Tiling, way: int, device: torch.device) -> Kernel:
    return Kernel(tiling.build(way), "linear", device, shared_bytes=tiling.shared_bytes)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
