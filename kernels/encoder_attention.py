"""Self-attention of the encoder, over the fused projections.

``qkv`` is what one product of width 3 · d gives, [batch, positions, 3, heads, 64]; the result, [batch, positions,
heads · 64], is what the product after it takes. FP16 in and out; scores, softmax and sums in FP32; scale 1/8; every
position sees every other.
"""

from __future__ import annotations

from ctypes import c_int, c_uint
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel, tensor_map

WIDTH = 64
"""Of a head; the same in every Whisper model."""

HEADS = (6, 8, 12, 16, 20)
MAX_POSITIONS = 4096

SimpleVariant = Literal["one_thread_a_score", "shared_keys"]
SIMPLE_VARIANTS: tuple[SimpleVariant, ...] = ("one_thread_a_score", "shared_keys")

_KEYS, _STAGES = 128, 4  # of encoder_attention_sm90.cu
_PORTABLE_ROWS, _PORTABLE_THREADS = 128, 128  # of encoder_attention_sm80.cu
_SIMPLE_QUERIES = 4  # of encoder_attention_simple.cu


def _hopper_build(consumers: int) -> Build:
    return build("encoder_attention_sm90.cu", ("sm_90a",), CONSUMERS=consumers)


def _simple_build(variant: SimpleVariant) -> Build:
    return build("encoder_attention_simple.cu", SHARED_KEYS=int(variant == "shared_keys"))


_PORTABLE = build("encoder_attention_sm80.cu")

BUILDS = (
    _hopper_build(3),
    _hopper_build(2),
    _PORTABLE,
    *map(_simple_build, SIMPLE_VARIANTS),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How Hopper's persistent blocks share the work. ``tiles``: of 64 · ``consumers`` queries of one head each."""

    consumers: int
    row_tiles: int
    tiles: int
    blocks: int


TILE_COST = {2: 0.72, 3: 1.0}
"""Time of one tile, measured on an H100 (14.7 and 20.5 µs at 1500 positions): the larger one has 1.5 times the work."""


def plan(batch: int, positions: int, heads: int, multiprocessors: int) -> Plan:
    """Large tiles, but for work so small that smaller ones need less time, because they leave fewer blocks idle."""

    def cut(consumers: int) -> Plan:
        row_tiles = -(-positions // (64 * consumers))
        tiles = row_tiles * heads * batch
        return Plan(consumers, row_tiles, tiles, min(tiles, multiprocessors))

    def cost(plan: Plan) -> float:
        return -(-plan.tiles // plan.blocks) * TILE_COST[plan.consumers]

    return min(cut(3), cut(2), key=cost)


def encoder_attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """qkv [batch, positions, 3, heads, 64], or with the last three as one, to [batch, positions, heads · 64].

    FP16, contiguous, on a GPU; positions: 1 to 4096; ``out``: where to, if not to a new tensor. ValueError where that
    does not hold. Hopper GPUs run FlashAttention-3's design (Shah et al., 2024), others FlashAttention-2's (Dao, 2023).
    """
    batch, positions, out = _checked(qkv, heads, out)
    if torch.cuda.get_device_capability(qkv.device) != (9, 0):
        return portable_attention(qkv, heads, out)
    index = _index(qkv)
    cut = plan(batch, positions, heads, _multiprocessors(index))
    fused = (batch, positions, 3 * heads, WIDTH)
    _hopper_kernel(index, cut.consumers)(
        cut.blocks,
        128 * (cut.consumers + 1),
        tensor_map(qkv, (1, 64 * cut.consumers, 1, WIDTH), fused),
        tensor_map(qkv, (1, _KEYS, 1, WIDTH), fused),
        tensor_map(out, (1, 64, 1, WIDTH), (batch, positions, heads, WIDTH)),
        c_int(positions),
        c_int(heads),
        c_int(cut.row_tiles),
        c_int(cut.tiles),
        c_uint(0),
    )
    return out


def portable_attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """The same by what every GPU from sm_80 on has."""
    batch, positions, out = _checked(qkv, heads, out)
    grid = (-(-positions // _PORTABLE_ROWS), heads, batch)
    _portable_kernel(_index(qkv))(grid, _PORTABLE_THREADS, qkv, out, c_int(positions), c_int(heads))
    return out


def simple_attention(qkv: Tensor, heads: int, variant: SimpleVariant) -> Tensor:
    """The same the plain way, where the comparison of kernels starts.

    A warp has one query and a lane one score at a time; it reads its key from global memory (``one_thread_a_score``) or
    from a tile in shared memory that the block has brought there (``shared_keys``).
    """
    batch, positions, out = _checked(qkv, heads, None)
    grid = (-(-positions // _SIMPLE_QUERIES), heads, batch)
    kernel = _simple_kernel(_index(qkv), variant, positions)
    kernel(grid, 32 * _SIMPLE_QUERIES, qkv, out, c_int(positions), c_int(heads))
    return out


def reference(qkv: Tensor, heads: int) -> Tensor:
    """The same by PyTorch, in any floating-point type, on any device."""
    batch, positions = qkv.shape[:2]
    q, k, v = qkv.view(batch, positions, 3, heads, WIDTH).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, positions, heads * WIDTH)


def _checked(qkv: Tensor, heads: int, out: Tensor | None) -> tuple[int, int, Tensor]:
    """Batch, positions and a place for the result; ValueError where the arguments do not fit."""
    if heads not in HEADS:
        raise ValueError(f"the encoder has {', '.join(map(str, HEADS))} heads, not {heads}")
    if qkv.dim() < 3 or qkv.shape[2:].numel() != 3 * heads * WIDTH:
        raise ValueError(f"qkv is [batch, positions, 3, {heads}, {WIDTH}], not {list(qkv.shape)}")
    batch, positions = qkv.shape[:2]
    if batch < 1 or not 1 <= positions <= MAX_POSITIONS:
        raise ValueError(
            f"a batch of {batch} × {positions} positions; 1 to {MAX_POSITIONS} positions can be attended to"
        )
    shape = (batch, positions, heads * WIDTH)
    for name, tensor in (("qkv", qkv), ("out", out)):
        if tensor is not None and not (
            tensor.is_cuda and tensor.dtype == torch.float16 and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        ):
            raise ValueError(f"{name} has to be contiguous FP16 on a GPU, at a multiple of 16 bytes")
    if out is None:
        out = torch.empty(shape, dtype=torch.float16, device=qkv.device)
    elif out.shape != shape or out.device != qkv.device:
        raise ValueError(f"out is {list(shape)} on {qkv.device}, not {list(out.shape)} on {out.device}")
    return batch, positions, out


def _index(tensor: Tensor) -> int:
    return torch.cuda.current_device() if tensor.device.index is None else tensor.device.index


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _hopper_kernel(index: int, consumers: int) -> Kernel:
    queries_and_results = 3 * 64 * consumers  # rows; queries twice, so that the next tile's are there in time
    shared_bytes = 1024 + (queries_and_results + 2 * _STAGES * _KEYS) * WIDTH * 2 + 512  # to align, and for barriers
    device = torch.device("cuda", index)
    return Kernel(_hopper_build(consumers), "encoder_attention_sm90", device, shared_bytes=shared_bytes)


@cache
def _portable_kernel(index: int) -> Kernel:
    return Kernel(_PORTABLE, "encoder_attention_sm80", torch.device("cuda", index))


@cache
def _simple_kernel(index: int, variant: SimpleVariant, positions: int) -> Kernel:
    scores = _SIMPLE_QUERIES * positions * 4
    return Kernel(_simple_build(variant), "encoder_attention_simple", torch.device("cuda", index), shared_bytes=scores)
