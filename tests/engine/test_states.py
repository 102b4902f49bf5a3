from __future__ import annotations

import pytest
import torch

from kernels.latent_attention import quantise
from serve_app.engine.precision import Compute
from serve_app.engine.states import Latent, SlotStates

FLOAT32 = Compute.resolve("cpu", "float32")


def states(count: int, width: int = 128) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(1500, width, generator=generator) for _ in range(count)]


def test_a_slot_has_what_was_loaded_into_it() -> None:
    first, second, third = states(3)
    kept = SlotStates(4, 1500, 128, FLOAT32)
    kept.load([2, 0], [first, second])
    assert torch.equal(kept.all.exact(2), first)
    assert torch.equal(kept.all.exact(0), second)
    kept.load([2], [third])
    kept.move(2, 1)
    assert torch.equal(kept.all.exact(1), third)
    assert torch.equal(kept.all.first(2).numbers, torch.stack([second, third]))
    assert not kept.all.exact(3).any()
    kept.load([], [])


def test_a_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an encoder state is \[1500, 128\], got \[1500, 64\]"):
        SlotStates(1, 1500, 128, FLOAT32).load([0], states(1, 64))


def test_bytes_are_near_what_they_stand_for() -> None:
    state = states(1)[0]
    numbers, scales = quantise(state.half()[None])
    kept = Latent(numbers, scales)
    error = kept.exact(0).float() - state
    largest = state.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True)
    assert bool((error.unflatten(1, (-1, 64)).abs() <= largest * (0.51 / 127 + 2**-10)).all())
    assert kept.first(1).scales is not None


def test_bytes_are_for_the_kernels() -> None:
    with pytest.raises(ValueError, match=r"encoder states in bytes need FP16 on a GPU, not torch.float32 on cpu"):
        SlotStates(1, 1500, 128, FLOAT32, bits=8)
