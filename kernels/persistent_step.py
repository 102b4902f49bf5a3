"""One decoding step of one or two windows as one kernel, with ready keys and values for cross-attention."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import self_attention
from kernels.compile import Build, build
from kernels.launch import Kernel

WIDTHS = (384, 512, 768, 1024, 1280)
"""Whisper's."""
SLOTS = (1, 2)
"""Numbers of windows that it is made for: a product's instruction has columns for no more, as they are used."""
ENCODED = 1500
HEAD = 64
MOST_LAYERS = 32
MOST_SPLITS = 12
"""Blocks that share a head's encoded positions."""
THREADS = 512 + 128
SHARED_BYTES = 227 * 1024
"""All that a block can have: weights that wait for their turn fill what is left."""
ARCHITECTURE = "sm_90a"
HOPPER_MULTIPROCESSORS = 132
FEWEST_MULTIPROCESSORS = 78
"""With fewer, as a part of a GPU may have, a block's share of a product does not fit its shared memory."""


def exchange_bytes(width: int, slots: int, blocks: int) -> int:
    """Of the source's ``Exchange``."""
    units = slots * width // HEAD
    splits = min(blocks // units, MOST_SPLITS)
    words = 8 * (slots * (width // 4 + width) + units * splits * 17)
    return 4 * slots * width * 7 + words + 8 * ((blocks + 1) // 2)


def persistent_build(width: int, slots: int, blocks: int = HOPPER_MULTIPROCESSORS) -> Build:
    return build(
        "persistent_step.cu",
        (ARCHITECTURE,),
        WIDTH=width,
        SLOTS=slots,
        BLOCKS=blocks,
        EXCHANGE=exchange_bytes(width, slots, blocks),
    )


def available(device: torch.device) -> bool:
    """Whether the kernel is made for this GPU."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return torch.cuda.get_device_properties(device).multi_processor_count >= FEWEST_MULTIPROCESSORS


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's tensors: weights of products [rows, columns] and their biases FP16, normalisation's FP32;
    caches FP16, [slots, positions, width] of self-attention, [slots, heads, 1500, 64] of cross-attention."""

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
        shape: tuple[int, ...]
        shapes = {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "up_weight": (inner, width)}
        shapes |= {"up_bias": (inner,), "down_weight": (width, inner)}
        for field in fields(self):
            tensor: Tensor = getattr(self, field.name)
            dtype = torch.float32 if "norm" in field.name else torch.float16
            if field.name.endswith(("keys", "values")):
                cross = field.name.startswith("cross")
                shape = (width // HEAD, ENCODED, HEAD) if cross else (*tensor.shape[1:2], width)
                right = tensor.shape[0] >= slots and tensor.shape[1:] == shape
            else:
                square = (width,) if field.name.endswith("bias") or dtype == torch.float32 else (width, width)
                right = tensor.shape == shapes.get(field.name, square)
            if not right or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(
                    f"{field.name} is {tensor.dtype} {list(tensor.shape)}, not what a layer of {width} has"
                )


POINTERS = (
    "qkv_weight",
    "self_out_weight",
    "query_weight",
    "cross_out_weight",
    "up_weight",
    "down_weight",
    "self_keys",
    "self_values",
    "cross_keys",
    "cross_values",
)
"""In the order of the source's ``Layer``."""
SMALL = (
    "self_norm_weight",
    "self_norm_bias",
    "cross_norm_weight",
    "cross_norm_bias",
    "mlp_norm_weight",
    "mlp_norm_bias",
    "qkv_bias",
    "self_out_bias",
    "query_bias",
    "cross_out_bias",
    "up_bias",
    "down_bias",
)
"""In the order of the source's ``Small``."""


class PersistentStep:
    """The kernel for one decoder and a number of slots (the first of its caches). It keeps the tensors it is given, and
    copies of the small ones. Its steps must come one after the other: they exchange numbers in the same memory."""

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
        width = token_table.shape[1]
        if width not in WIDTHS or slots not in SLOTS or len(layers) > MOST_LAYERS:
            raise ValueError(f"no kernel for {slots} slots, {len(layers)} layers of width {width}")
        for layer in layers:
            layer.check(width, slots)
        device = token_table.device
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.slots, self._blocks = slots, blocks
        self._kept = (tuple(layers), token_table, position_table, norm_weight, norm_bias)
        pointers = [[getattr(layer, name).data_ptr() for name in POINTERS] for layer in layers]
        self._layers = torch.tensor(pointers, dtype=torch.int64, device=device)
        self._small = torch.stack([torch.cat([getattr(layer, name).float() for name in SMALL]) for layer in layers])
        exchange = exchange_bytes(width, slots, blocks)
        self._exchange = torch.zeros(exchange, dtype=torch.uint8, device=device)
        made = persistent_build(width, slots, blocks)
        self._kernel = Kernel(made, "persistent_step", device, shared_bytes=SHARED_BYTES)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: [slots] int32 with the same stride → float32 logits [slots, n_vocab]."""
        if tokens.shape != (self.slots,) or positions.shape != (self.slots,) or tokens.stride() != positions.stride():
            raise ValueError(f"tokens and positions must be [{self.slots}] with the same stride")
        if tokens.dtype != torch.int32 or positions.dtype != torch.int32:
            raise ValueError("tokens and positions must be int32")
        layers, token_table, position_table, norm_weight, norm_bias = self._kept
        n_vocab = len(token_table)
        logits = torch.empty(self.slots, n_vocab, device=tokens.device)
        self._kernel(
            self._blocks,
            THREADS,
            self._layers,
            self._small,
            ctypes.c_int(len(layers)),
            token_table,
            position_table,
            norm_weight,
            norm_bias,
            tokens,
            positions,
            ctypes.c_int(tokens.stride(0)),
            logits,
            ctypes.c_int(n_vocab),
            ctypes.c_int(len(position_table)),
            self._exchange,
        )
        return logits


def reference(
    layers: Sequence[Layer],
    token_table: Tensor,
    position_table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    tokens: Tensor,
    positions: Tensor,
) -> Tensor:
    """The same in plain PyTorch, in any one precision of all tensors: logits [slots, n_vocab]."""
    slots, width = len(tokens), token_table.shape[1]
    x = token_table[tokens.long()] + position_table[positions.long().clamp(max=len(position_table) - 1)]
    for layer in layers:
        y = F.layer_norm(x, (width,), layer.self_norm_weight, layer.self_norm_bias)
        qkv = F.linear(y, layer.qkv_weight, layer.qkv_bias)
        mixed = self_attention.reference(qkv, layer.self_keys[:slots], layer.self_values[:slots], positions)
        x = x + F.linear(mixed, layer.self_out_weight, layer.self_out_bias)
        y = F.layer_norm(x, (width,), layer.cross_norm_weight, layer.cross_norm_bias)
        query = F.linear(y, layer.query_weight, layer.query_bias).view(slots, -1, 1, HEAD)
        mixed = F.scaled_dot_product_attention(query, layer.cross_keys[:slots], layer.cross_values[:slots])
        x = x + F.linear(mixed.reshape(slots, width), layer.cross_out_weight, layer.cross_out_bias)
        y = F.layer_norm(x, (width,), layer.mlp_norm_weight, layer.mlp_norm_bias)
        y = F.gelu(F.linear(y, layer.up_weight, layer.up_bias))
        x = x + F.linear(y, layer.down_weight, layer.down_bias)
    return F.linear(F.layer_norm(x, (width,), norm_weight, norm_bias), token_table)


BUILDS = tuple(persistent_build(width, slots) for width in WIDTHS for slots in SLOTS)
