"""Latent cross-attention: Whisper's decoder attends to the encoder state itself instead of keys and values made of it.

With W_k folded into the query and W_v applied afterwards all layers and heads read the same array (see
``serve_app.engine.decoder``), so a step is bound by reading 1500 · d numbers a window and layer, once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

POSITIONS = 1500
GROUP = 64
"""Columns that share a scale where the state is in bytes."""

FEW = 8
"""Windows that are put together by many small blocks, as there are many parts of each."""

HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}
"""Whisper's widths, and how many heads each has."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernel is cut: positions in a tile, tiles held in shared memory, warps of a block."""

    keys: int
    stages: int
    warps: int = 8

    def shared_bytes(self, width: int, bits: int) -> int:
        """Dynamic shared memory of a block, as the source lays it out."""
        heads = -(-HEADS[width] // 8) * 8
        columns = width // self.warps
        pitch = columns * bits // 8
        stage = self.keys * (pitch if pitch % 32 else pitch + 16)
        halves = 0
        if bits == 8:
            stage += (-(-columns // 64) + (columns % 64 != 0)) * self.keys * 2
            halves = self.keys * (columns * 2 + 16)
        scores = self.warps * heads * (self.keys + 4) * 4
        arrivals = self.warps * self.stages * 8
        return self.warps * (self.stages * stage + halves) + scores + heads * (self.keys + 8) * 2 + heads * 4 + arrivals


def shape(width: int, bits: int, shared_limit: int) -> Shape:
    """The cut for a model's width, and what a block may have of shared memory on the GPU: 227 KB on Hopper, 163 KB on
    A100, 99 KB on consumer cards."""
    for keys, most in ((32, 4), (16, 4)):
        for stages in range(most, 0 if keys == 16 else 1, -1):
            cut = Shape(keys, stages)
            if cut.shared_bytes(width, bits) <= shared_limit:
                return cut
    raise ValueError(f"{shared_limit} bytes of shared memory hold no tile of a state {width} wide")


def latent_build(width: int, bits: int, cut: Shape) -> Build:
    return build(
        "latent_attention.cu",
        WIDTH=width,
        HEADS=HEADS[width],
        BITS=bits,
        KEYS=cut.keys,
        STAGES=cut.stages,
        WARPS=cut.warps,
    )


def plan_blocks(windows: int, tiles: int, multiprocessors: int) -> int:
    """How many blocks share the windows' tiles (``tiles`` each).

    Where the windows or a whole number of equal parts of each fill nearly all multiprocessors, blocks end with their
    window and little or nothing is left to put together; the memory is busy as well with a few multiprocessors less.
    """
    enough = multiprocessors * 7 // 8
    if windows >= multiprocessors:
        rounds = -(-windows // multiprocessors)
        even = -(-windows // rounds)
        return even if even >= enough and windows % even == 0 else multiprocessors
    parts = min(multiprocessors // windows, tiles)
    even = windows * parts
    return even if even >= enough or parts == tiles else min(multiprocessors, windows * tiles)


class LatentAttention:
    """The kernel for one width on one GPU; ``bits``: of the state's numbers, 16 or 8."""

    def __init__(self, width: int, device: torch.device, *, bits: int = 16, cut: Shape | None = None):
        if width not in HEADS:
            raise ValueError(f"Whisper models are {', '.join(map(str, HEADS))} wide, not {width}")
        if bits not in (8, 16):
            raise ValueError(f"a state's numbers have 8 or 16 bits, not {bits}")
        self.width, self.heads, self.bits = width, HEADS[width], bits
        properties = torch.cuda.get_device_properties(device)
        limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # PyTorch's stub lacks it
        self.cut = cut or shape(width, bits, limit)
        made = latent_build(width, bits, self.cut)
        shared_bytes = self.cut.shared_bytes(width, bits)
        self._attend = Kernel(made, "latent_attention", device, shared_bytes=shared_bytes)
        self._combine = Kernel(made, "latent_attention_combine", device)
        self._tiles = -(-POSITIONS // self.cut.keys)
        self._multiprocessors = properties.multi_processor_count
        parts = 2 * self._multiprocessors
        self._partial_out = torch.empty(parts, self.heads, width, device=device, dtype=torch.float16)
        self._partial_sums = torch.empty(parts, self.heads, 2, device=device, dtype=torch.float32)

    def __call__(self, queries: Tensor, states: Tensor, out: Tensor, *, scales: Tensor | None = None) -> None:
        """queries, out: [windows, heads, width] FP16, contiguous in the last dimension. states: [windows, 1500, width],
        FP16, or bytes with their scales [windows, width / 64, 1504] FP16 (``quantise``). Fills ``out`` with
        softmax(queries · statesᵀ / 8) · states: 8 is the root of Whisper's 64 numbers a head."""
        windows = queries.shape[0]
        expected = (windows, self.heads, self.width)
        if queries.shape != expected or out.shape != expected or queries.stride() != out.stride():
            raise ValueError(f"queries and out must be {list(expected)} with the same strides")
        if states.shape != (windows, POSITIONS, self.width) or not states.is_contiguous():
            raise ValueError(f"states must be [{windows}, {POSITIONS}, {self.width}], got {list(states.shape)}")
        if states.dtype != (torch.float16 if self.bits == 16 else torch.uint8) or queries.dtype != torch.float16:
            raise ValueError(f"the state's numbers must have {self.bits} bits, the queries' 16")
        if (scales is None) != (self.bits == 16):
            raise ValueError("states in bytes need scales, others have none")
        blocks = plan_blocks(windows, self._tiles, self._multiprocessors)
        window_stride, head_stride, _ = (ctypes.c_int(stride) for stride in queries.stride())
        self._attend(
            blocks,
            32 * self.cut.warps,
            states,
            scales,
            queries,
            out,
            self._partial_out,
            self._partial_sums,
            ctypes.c_int(windows),
            window_stride,
            head_stride,
            ctypes.c_float(log2(torch.e) / 8),
        )
        if windows % blocks:  # else every block holds whole windows
            threads = 32 if windows < FEW else self.width // 4
            self._combine(
                (windows, self.heads, self.width // 4 // threads),
                threads,
                self._partial_out,
                self._partial_sums,
                out,
                ctypes.c_int(windows),
                ctypes.c_int(blocks),
                window_stride,
                head_stride,
            )


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """states [..., 1500, d] → bytes of the same shape, 128 standing for 0, and the scales [..., d / 64, 1504] FP16 of
    each 64 columns of a position. The scales lie by column group, so that a tile's are read in a row."""
    groups = states.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(dim=-1) / 127).clamp(min=2**-24).half()
    numbers = (groups / scales.float()[..., None]).round().clamp(-127, 127) + 128
    by_group = F.pad(scales.transpose(-1, -2), (0, -POSITIONS % 8))
    return numbers.flatten(-2).to(torch.uint8), by_group.contiguous()


def dequantise(numbers: Tensor, scales: Tensor) -> Tensor:
    """What ``quantise`` kept of a state, float32."""
    by_position = scales[..., :POSITIONS].transpose(-1, -2).float()
    kept: Tensor = ((numbers.float() - 128).unflatten(-1, (-1, GROUP)) * by_position[..., None]).flatten(-2)
    return kept


def reference(queries: Tensor, states: Tensor) -> Tensor:
    """queries [windows, any, d], states [windows, 1500, d] → [windows, any, d], in plain PyTorch: the state is both the
    keys and the values of one attention head as wide as the model."""
    shared = states[:, None]
    return F.scaled_dot_product_attention(queries[:, None], shared, shared, scale=1 / 8)[:, 0]


BUILDS = tuple(
    dict.fromkeys(
        Build(made.source, made.definitions, architectures)
        for architectures, limit in ((("sm_80",), 163), (("sm_89",), 99), (("sm_90a", "sm_100"), 227))
        for width in HEADS
        for bits in (16, 8)
        for made in [latent_build(width, bits, shape(width, bits, limit * 1024))]
    )
)
