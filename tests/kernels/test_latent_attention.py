"""Latent cross-attention: what can be said of it without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.compile import ARCHITECTURES
from kernels.latent_attention import HEADS, Shape, dequantise, plan_blocks, quantise, reference, shape

SHARED_LIMITS = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_100": 227}  # KB a block


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_width_has_a_cut_that_fits(architecture: str) -> None:
    limit = SHARED_LIMITS[architecture] * 1024
    for width in HEADS:
        for bits in (8, 16):
            assert shape(width, bits, limit).shared_bytes(width, bits) <= limit


def test_shared_memory_that_holds_no_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="hold no tile"):
        shape(1280, 16, 48 * 1024)


@given(windows=st.integers(1, 512), tiles=st.sampled_from([47, 94]), multiprocessors=st.integers(16, 160))
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
    assert bool((error <= 0.501 * step + 127 * step * 2**-11).all())  # the scale is rounded to FP16


def test_attending_to_one_sharp_position_returns_it() -> None:
    states = torch.randn(2, 1500, 64, generator=torch.Generator().manual_seed(1))
    queries = states[:, [7, 1499]] * 100
    torch.testing.assert_close(reference(queries, states), states[:, [7, 1499]])


def test_a_cut_says_what_it_takes() -> None:
    # 8 warps · 2 stages · 32 positions · (160 columns · 2 bytes + 16), scores 8 · 24 · 36 · 4, weights 24 · 40 · 2,
    # rescales 24 · 4, barriers 8 · 2 · 8
    assert Shape(32, 2).shared_bytes(1280, 16) == 172_032 + 27_648 + 1_920 + 96 + 128
