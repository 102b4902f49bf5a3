"""One decoding step of one or two windows as one kernel, with ready keys and values for cross-attention."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

WIDTHS = (384, 512, 768, 1024, 1280)
"""Whisper's."""
SLOTS = (1, 2)
"""Numbers of windows that it is made for: with more, registers no longer hold what is on its way."""
ENCODED = 1500
MOST_VOCABULARY = 51866
THREADS = 512
ARCHITECTURE = "sm_90a"
HOPPER_MULTIPROCESSORS = 132


def persistent_build(width: int, slots: int, blocks: int = HOPPER_MULTIPROCESSORS) -> Build:
    return build("persistent_step.cu", (ARCHITECTURE,), WIDTH=width, SLOTS=slots, BLOCKS=blocks)


def available(device: torch.device) -> bool:
    """Whether the kernel is made for this GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def shared_bytes(width: int, slots: int) -> int:
    """Dynamic shared memory of a block, as the source's ``Shared`` has it."""
    warps = THREADS // 32
    groups = THREADS // 8
    return slots * (4 * width + 8) * 2 + slots * width * 4 + warps * 8 * slots * 4 + 2 * groups * 4 + groups * 65 * 4


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's tensors, in the order of the source's ``Layer``: weights of products [rows, columns] and their
    biases FP16, normalisation's FP32, caches FP16 [slots, positions, width]."""

    self_norm_weight: Tensor
    self_norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    self_out_weight: Tensor
    self_out_bias: Tensor
    self_keys: Tensor
    self_values: Tensor
    cross_norm_weight: Tensor
    cross_norm_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    cross_keys: Tensor
    cross_values: Tensor
    cross_out_weight: Tensor
    cross_out_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor

    def check(self, width: int, slots: int) -> None:
        """Raises ValueError for a tensor that the kernel would misread."""
        inner = 4 * width
        shapes = {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "up_weight": (inner, width)}
        shapes |= {"up_bias": (inner,), "down_weight": (width, inner)}
        for field in fields(self):
            tensor: Tensor = getattr(self, field.name)
            dtype = torch.float32 if "norm" in field.name else torch.float16
            if field.name.endswith(("keys", "values")):
                positions = ENCODED if field.name.startswith("cross") else tensor.shape[1]
                right = tensor.shape[0] >= slots and tensor.shape[1:] == (positions, width)
            else:
                square = (width,) if field.name.endswith("bias") or dtype == torch.float32 else (width, width)
                right = tensor.shape == shapes.get(field.name, square)
            if not right or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(
                    f"{field.name} is {tensor.dtype} {list(tensor.shape)}, not what a layer of {width} has"
                )


class PersistentStep:
    """The kernel for one decoder and a number of slots (the first of its caches). It keeps the tensors it is given."""

    def __init__(
        self,
        layers: Sequence[Layer],
        token_table: Tensor,
        position_table: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        slots: int,
    ):
        """token_table: [n_vocab, width] FP16, also the last product's weights; position_table: [n_ctx, width] FP32."""
        n_vocab, width = token_table.shape
        if width not in WIDTHS or slots not in SLOTS or n_vocab > MOST_VOCABULARY:
            raise ValueError(f"no kernel for {slots} slots, width {width}, a vocabulary of {n_vocab}")
        for layer in layers:
            layer.check(width, slots)
        device = token_table.device
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.slots, self._n_vocab, self._blocks = slots, n_vocab, blocks
        self._kept = (tuple(layers), token_table, position_table, norm_weight, norm_bias)
        pointers = [[getattr(layer, field.name).data_ptr() for field in fields(Layer)] for layer in layers]
        self._layers = torch.tensor(pointers, dtype=torch.int64, device=device)

        def half(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float16, device=device)

        heads = width // 64
        splits = max(1, blocks // (slots * heads))
        # in the order of the source's Work
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._memory = (
            torch.zeros(slots, width, device=device),
            half(slots, 3 * width),
            half(slots, width),
            half(slots, 4 * width),
            torch.zeros(slots, heads, splits, 66, device=device),
            self._arrived,
        )
        self._work = torch.tensor([t.data_ptr() for t in self._memory], dtype=torch.int64, device=device)
        made = persistent_build(width, slots, blocks)
        self._kernel = Kernel(made, "persistent_step", device, shared_bytes=shared_bytes(width, slots))

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: [slots] int32 with the same stride → float32 logits [slots, n_vocab]."""
        if tokens.shape != (self.slots,) or positions.shape != (self.slots,) or tokens.stride() != positions.stride():
            raise ValueError(f"tokens and positions must be [{self.slots}] with the same stride")
        if tokens.dtype != torch.int32 or positions.dtype != torch.int32:
            raise ValueError("tokens and positions must be int32")
        layers, token_table, position_table, norm_weight, norm_bias = self._kept
        logits = torch.empty(self.slots, self._n_vocab, device=tokens.device)
        self._arrived.zero_()
        self._kernel(
            self._blocks,
            THREADS,
            self._layers,
            ctypes.c_int(len(layers)),
            token_table,
            position_table,
            norm_weight,
            norm_bias,
            tokens,
            positions,
            ctypes.c_int(tokens.stride(0)),
            logits,
            ctypes.c_int(self._n_vocab),
            ctypes.c_int(len(position_table)),
            self._work,
        )
        return logits


BUILDS = tuple(persistent_build(width, slots) for width in WIDTHS for slots in SLOTS)
