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
from kernels.launch import Kernel, tensor_map

POSITIONS = 1500
GROUP = 64
"""Columns that share a scale where the state is in bytes."""

LARGEST_SCALE = 56.0
"""Of bytes: 1152 times it is still an FP16 number."""

FEW_PARTS = 3
"""Of a window, which Hopper's kernel puts together itself: whoever ends last. More are read by more of the GPU."""

SUM_WARPS = 8
"""Of Hopper's kernel: each puts its columns together by itself."""

HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}
"""Whisper's widths, and how many heads each has."""


SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block may have."""


@dataclass(frozen=True, slots=True)
class HopperShape:
    """How Hopper's kernel is cut: positions in a tile, tiles held in shared memory."""

    keys: int
    stages: int

    def shared_bytes(self, width: int, bits: int) -> int:
        """Dynamic shared memory of a block, as the source lays it out."""
        heads = -(-HEADS[width] // 8) * 8
        score_warps = 4
        tile = self.keys * width * bits // 8
        scales = -(-width // GROUP * self.keys * 2 // 128) * 128 if bits == 8 else 0
        partial_scores = 2 * score_warps * heads * (self.keys + 4) * 4
        weights, factors, flags, barriers = heads * (self.keys + 8) * 2, 2 * heads * 4, score_warps * 4, 3 * 8
        stage = tile + scales + weights + factors + flags + barriers
        return 1024 + partial_scores + self.stages * stage  # 1024 to begin at a multiple of it


def hopper_shape(width: int, bits: int) -> HopperShape:
    """Tiles of 32 positions, or 64 where those are small; three of them, or two where there is no more room."""
    keys = 32 if width * bits >= 768 * 8 else 64
    cuts = (HopperShape(keys, stages) for stages in (3, 2))
    return next(cut for cut in cuts if cut.shared_bytes(width, bits) <= SHARED_LIMIT["sm_90a"])


def hopper_build(width: int, bits: int, cut: HopperShape) -> Build:
    return build(
        "latent_attention_sm90.cu",
        ("sm_90a",),
        WIDTH=width,
        HEADS=HEADS[width],
        BITS=bits,
        KEYS=cut.keys,
        STAGES=cut.stages,
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernel for other GPUs is cut: positions in a tile, tiles held in shared memory, warps of a block."""

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
    """The cut of the kernel for other GPUs than Hopper for a model's width, and what a block may have of shared memory
    on the GPU: 227 KB on Blackwell, 163 KB on A100, 99 KB on consumer cards."""
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
    """The kernel for one width on one GPU; ``bits``: of the state's numbers, 16 or 8. Hopper has its own, unless a cut
    of the other one is given."""

    def __init__(self, width: int, device: torch.device, *, bits: int = 16, cut: Shape | HopperShape | None = None):
        if width not in HEADS:
            raise ValueError(f"Whisper models are {', '.join(map(str, HEADS))} wide, not {width}")
        if bits not in (8, 16):
            raise ValueError(f"a state's numbers have 8 or 16 bits, not {bits}")
        self.width, self.heads, self.bits = width, HEADS[width], bits
        properties = torch.cuda.get_device_properties(device)
        if cut is None and torch.cuda.get_device_capability(device) == (9, 0):
            cut = hopper_shape(width, bits)
        limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # PyTorch's stub lacks it
        self.cut = cut or shape(width, bits, limit)
        if self.cut.shared_bytes(width, bits) > limit:
            raise ValueError(
                f"{self.cut} of a state {width} wide with {bits} bits takes {self.cut.shared_bytes(width, bits)} bytes "
                f"of shared memory, the GPU has {limit}"
            )
        if isinstance(self.cut, HopperShape):
            made, name, self._threads = hopper_build(width, bits, self.cut), "latent_attention_sm90", 384
        else:
            made, name, self._threads = latent_build(width, bits, self.cut), "latent_attention", 32 * self.cut.warps
        self._attend = Kernel(made, name, device, shared_bytes=self.cut.shared_bytes(width, bits))
        self._combine = Kernel(made, "latent_attention_combine", device)
        self._tiles = -(-POSITIONS // self.cut.keys)
        self._multiprocessors = properties.multi_processor_count
        parts = 2 * self._multiprocessors
        self._partial_out = torch.empty(parts, self.heads, width, device=device, dtype=torch.float16)
        self._partial_sums = torch.empty(parts, self.heads, 2, device=device, dtype=torch.float32)
        self._arrivals = torch.zeros(self._multiprocessors, SUM_WARPS, device=device, dtype=torch.int32)

    def __call__(self, queries: Tensor, states: Tensor, out: Tensor, *, scales: Tensor | None = None) -> None:
        """queries, out: [windows, heads, width] FP16, contiguous in the last dimension. states: [windows, 1500, width],
        FP16, or bytes with their scales [windows, width / 64, 1504] FP16 (``quantise``). Fills ``out`` with
        softmax(queries · statesᵀ / 8) · states: 8 is the root of Whisper's 64 numbers a head."""
        windows = queries.shape[0]
        expected = (windows, self.heads, self.width)
        if queries.shape != expected or out.shape != expected or queries.stride() != out.stride():
            raise ValueError(f"queries and out must be {list(expected)} with the same strides")
        window_stride, head_stride, last_stride = queries.stride()
        if last_stride != 1 or any(n % 8 for n in (window_stride, head_stride)):
            raise ValueError("rows of queries and out must be contiguous and begin at multiples of 16 bytes")
        if states.shape != (windows, POSITIONS, self.width) or not states.is_contiguous():
            raise ValueError(f"states must be [{windows}, {POSITIONS}, {self.width}], got {list(states.shape)}")
        if states.dtype != (torch.float16 if self.bits == 16 else torch.uint8) or queries.dtype != torch.float16:
            raise ValueError(f"the state's numbers must have {self.bits} bits, the queries' 16")
        if (scales is None) != (self.bits == 16):
            raise ValueError("states in bytes need scales, others have none")
        blocks = plan_blocks(windows, self._tiles, self._multiprocessors)
        strides = ctypes.c_int(window_stride), ctypes.c_int(head_stride)
        combined = windows % blocks == 0  # every block holds whole windows
        source: tuple[object, ...]
        arrivals: tuple[object, ...] = ()
        if isinstance(self.cut, Shape):
            source = states, scales
        else:
            source = self._maps(self.cut, states, scales)
            combined |= blocks <= FEW_PARTS * windows
            arrivals = (self._arrivals if combined else None,)
        self._attend(
            blocks,
            self._threads,
            *source,
            queries,
            out,
            self._partial_out,
            self._partial_sums,
            *arrivals,
            ctypes.c_int(windows),
            *strides,
            ctypes.c_float(log2(torch.e) / 8),
        )
        if not combined:
            self._combine(
                (windows, self.heads, self.width // 128),
                256,
                self._partial_out,
                self._partial_sums,
                out,
                ctypes.c_int(windows),
                ctypes.c_int(blocks),
                *strides,
            )

    def _maps(self, cut: HopperShape, states: Tensor, scales: Tensor | None) -> tuple[object, ...]:
        """What the copy engine needs to know: a tile is 128 bytes of each of its rows, then the next 128, and so on."""
        windows, size = len(states), states.element_size()
        chunks, columns = self.width * size // 128, 128 // size
        row = self.width * size
        by_chunk = tensor_map(
            states,
            (1, chunks, cut.keys, columns),
            (windows, chunks, POSITIONS, columns),
            strides=(POSITIONS * row, 128, row, size),
        )
        if scales is None:
            return (by_chunk,)
        groups, positions = scales.shape[1:]
        return by_chunk, tensor_map(scales, (1, groups, cut.keys), (windows, groups, positions), swizzled=False)


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """states [..., 1500, d] → bytes of the same shape, 128 standing for 0, and the scales [..., d / 64, 1504] FP16 of
    each 64 columns of a position. The scales lie by column group, so that a tile's are read in a row.

    A scale has 7 significant bits, rounded up, so that 1152 times it is an FP16 number too, which saves Hopper's kernel
    an instruction for every two bytes; larger numbers than 7000 are cut off, so that this stays finite."""
    groups = states.float().unflatten(-1, (-1, GROUP))
    fraction, exponent = torch.frexp(groups.abs().amax(dim=-1) / 127)
    scales = torch.ldexp((fraction * 128).ceil() / 128, exponent)
    scales = ((scales * 2**24).ceil() / 2**24).clamp(2**-24, LARGEST_SCALE).half()  # of FP16's smallest, whole steps
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


def _builds() -> tuple[Build, ...]:
    portable: dict[Build, list[str]] = {}
    for architecture in ("sm_80", "sm_89", "sm_100"):
        for width in HEADS:
            for bits in (16, 8):
                made = latent_build(width, bits, shape(width, bits, SHARED_LIMIT[architecture]))
                portable.setdefault(made, []).append(architecture)
    hopper = [hopper_build(width, bits, hopper_shape(width, bits)) for width in HEADS for bits in (16, 8)]
    return (*hopper, *(Build(made.source, made.definitions, tuple(where)) for made, where in portable.items()))


BUILDS = _builds()
