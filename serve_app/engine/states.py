"""The encoder states of a decoder's slots, as latent cross-attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.latent_attention import GROUP, dequantise, quantise
from serve_app.engine.precision import Compute

Bits = Literal[8, 16]

TOGETHER = 4
"""States that are made bytes at once: few calls, and little memory for what lies between."""


@dataclass(frozen=True, slots=True)
class Latent:
    """numbers: [n, 1500, d] in the compute precision, or bytes with scales [n, d / 64, 1504] FP16
    (``kernels.latent_attention.quantise``)."""

    numbers: Tensor
    scales: Tensor | None = None

    def first(self, n: int) -> Latent:
        return Latent(self.numbers[:n], None if self.scales is None else self.scales[:n])

    def exact(self, slot: int) -> Tensor:
        """A slot's state [1500, d] as numbers to multiply with."""
        if self.scales is None:
            return self.numbers[slot]
        return dequantise(self.numbers[slot], self.scales[slot]).half()


class SlotStates:
    """One state [1500, d] for each slot. bits: 16 is the compute precision; 8 halves what a step reads of each window,
    and needs the kernels."""

    def __init__(self, slots: int, positions: int, width: int, compute: Compute, bits: Bits = 16):
        if bits == 8 and not compute.has_kernels:
            raise ValueError(
                f"encoder states in bytes need FP16 on a GPU, not {compute.dtype} on {compute.device.type}"
            )
        shape, device = (slots, positions, width), compute.device
        if bits == 8:
            scales = torch.zeros(slots, width // GROUP, positions + -positions % 8, device=device, dtype=torch.float16)
            self.all = Latent(torch.full(shape, 128, device=device, dtype=torch.uint8), scales)
        else:
            self.all = Latent(torch.zeros(shape, device=device, dtype=compute.dtype))
        self._shape = shape[1:]
        self._numbers = self.all.numbers.unbind()
        self._scales = None if self.all.scales is None else self.all.scales.unbind()

    def load(self, slots: Sequence[int], states: Sequence[Tensor]) -> None:
        """Puts states [1500, d] in the compute precision into slots."""
        for state in states:
            if state.shape != self._shape:
                raise ValueError(f"an encoder state is {list(self._shape)}, got {list(state.shape)}")
        if not slots:
            return
        # all in few calls: after each the interpreter may be given to another thread
        numbers = [self._numbers[slot] for slot in slots]
        if self._scales is None:
            torch._foreach_copy_(numbers, list(states), non_blocking=True)
            return
        scales = [self._scales[slot] for slot in slots]
        for first in range(0, len(slots), TOGETHER):
            part = slice(first, first + TOGETHER)
            made = quantise(torch.stack([state.to(numbers[0].device) for state in states[part]]))
            for kept, new in zip((numbers[part], scales[part]), made, strict=True):
                torch._foreach_copy_(kept, list(new.unbind()))

    def move(self, source: int, target: int) -> None:
        """Copies a slot's state into another slot."""
        self._numbers[target].copy_(self._numbers[source])
        if self._scales is not None:
            self._scales[target].copy_(self._scales[source])
