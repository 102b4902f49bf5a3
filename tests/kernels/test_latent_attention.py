"""Latent cross-attention: what can be said of it without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.compile import ARCHITECTURES
from kernels.latent_attention import (
    BUILDS,
    HEADS,
    SHARED_LIMIT,
    HopperShape,
    Shape,
    dequantise,
    hopper_shape,
    plan_blocks,
    quantise,
    reference,
    shape,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_width_has_a_cut_that_fits(architecture: str) -> None:
    limit = SHARED_LIMIT[architecture]
    for width in HEADS:
        for bits in (8, 16):
            cut = hopper_shape(width, bits) if architecture == "sm_90a" else shape(width, bits, limit)
            assert cut.shared_bytes(width, bits) <= limit


def test_hopper_has_its_own_source() -> None:
    sources = {
        architecture: {made.source for made in BUILDS if architecture in made.architectures}
        for architecture in ARCHITECTURES
    }
    assert sources.pop("sm_90a") == {"latent_attention_sm90.cu"}
    assert all(others == {"latent_attention.cu"} for others in sources.values())


def test_shared_memory_that_holds_no_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="hold no tile"):
        shape(1280, 16, 48 * 1024)


@given(windows=st.integers(1, 512), tiles=st.sampled_from([24, 47, 94]), multiprocessors=st.integers(16, 160))
def test_blocks_never_exceed_the_work_or_the_gpu(windows: int, tiles: int, multiprocessors: int) -> None:
    blocks = plan_blocks(windows, tiles, multiprocessors)
    assert 1 <= blocks <= min(multiprocessors, windows * tiles)
    assert blocks >= min(multiprocessors * 7 // 8, windows * tiles // 2)


def test_where_it_costs_little_no_window_is_shared() -> None:
    assert plan_blocks(128, 47, 132) == 128
    assert plan_blocks(256, 47, 132) == 128
    assert plan_blocks(64, 47, 132) == 128  # each in two equal parts
    assert plan_blocks(1, 47, 132) == 47


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32 - 1))
def test_bytes_keep_a_state_to_half_a_step(scale: float, seed: int) -> None:
    state = torch.randn(1500, 64 * 2, generator=torch.Generator().manual_seed(seed)) * scale
    numbers, scales = quantise(state)
    assert numbers.shape == state.shape
    assert scales.shape == (2, 1504)
    step = state.unflatten(-1, (2, 64)).abs().amax(dim=-1, keepdim=True) / 127
    error = (dequantise(numbers, scales) - state).abs().unflatten(-1, (2, 64))
    assert bool((error <= 0.501 * step * (1 + 1 / 64)).all())  # the scale is rounded up to 7 bits


@given(amplitude=st.floats(0, 60000), seed=st.integers(0, 2**32 - 1))
def test_what_the_kernel_makes_of_bytes_is_rounded_once(amplitude: float, seed: int) -> None:
    state = (torch.randn(1500, 64, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1) * amplitude).half()
    numbers, scales = quantise(state)
    assert bool((scales[:, :1500] > 0).all())
    biases = scales.double() * 1152
    torch.testing.assert_close(biases.half().double(), biases, rtol=0, atol=0)
    limit = scales[0, :1500, None].float() * 127
    torch.testing.assert_close(
        dequantise(numbers, scales), state.float().clamp(-limit, limit), rtol=0, atol=float(limit.max()) / 250
    )


def test_larger_numbers_than_bytes_can_stand_for_are_cut_off() -> None:
    state = torch.full((1500, 64), 30000.0)
    assert float(dequantise(*quantise(state)).max()) == 127 * 56


def test_a_state_of_zeros_stays_one() -> None:
    state = torch.zeros(1500, 64)
    assert torch.equal(dequantise(*quantise(state)), state)


def test_attending_to_one_sharp_position_returns_it() -> None:
    states = torch.randn(2, 1500, 64, generator=torch.Generator().manual_seed(1))
    queries = states[:, [7, 1499]] * 100
    torch.testing.assert_close(reference(queries, states), states[:, [7, 1499]])


def test_a_cut_says_what_it_takes() -> None:
    # 8 warps · 2 stages · 32 positions · (160 columns · 2 bytes + 16), scores 8 · 24 · 36 · 4, weights 24 · 40 · 2,
    # rescales 24 · 4, barriers 8 · 2 · 8
    assert Shape(32, 2).shared_bytes(1280, 16) == 172_032 + 27_648 + 1_920 + 96 + 128


def test_a_cut_of_hoppers_kernel_says_what_it_takes() -> None:
    # to begin at a multiple of 1024, partial scores 2 · 4 · 24 · 36 · 4; of each stage the tile 32 · 1280, scales
    # 20 · 32 · 2, weights 24 · 40 · 2, rescales and norms 2 · 24 · 4, flags 4 · 4, barriers 3 · 8
    stage = 40_960 + 1_280 + 1_920 + 192 + 16 + 24
    assert HopperShape(32, 4).shared_bytes(1280, 8) == 1024 + 27_648 + 4 * stage
    # scales of a tile begin at a multiple of 128: 6 · 16 · 2 take 256
    stage = 16 * 384 + 256 + 384 + 64 + 16 + 24
    assert HopperShape(16, 2).shared_bytes(384, 8) == 1024 + 2 * 4 * 8 * 20 * 4 + 2 * stage
