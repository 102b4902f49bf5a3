"""The encoder's self-attention: what can be said of it without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.encoder_attention import HEADS, encoder_attention, plan, reference

shapes = st.tuples(st.integers(1, 64), st.integers(1, 4096), st.sampled_from(HEADS), st.integers(1, 200))


@given(shapes)
def test_tiles_cover_all_queries_of_all_heads_and_no_block_is_without_one(shape: tuple[int, int, int, int]) -> None:
    batch, positions, heads, multiprocessors = shape
    cut = plan(batch, positions, heads, multiprocessors)
    rows = 64 * cut.consumers
    assert (cut.row_tiles - 1) * rows < positions <= cut.row_tiles * rows
    assert cut.tiles == cut.row_tiles * heads * batch
    assert 1 <= cut.blocks <= min(cut.tiles, multiprocessors)


def test_small_work_is_cut_finer() -> None:
    assert plan(1, 1500, 20, 132).consumers == 2
    assert plan(4, 1500, 20, 132).consumers == 3
    assert plan(16, 1500, 20, 132).consumers == 3


def test_the_reference_is_the_formula() -> None:
    heads, positions = 6, 5
    qkv = torch.randn(2, positions, 3, heads, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv.numpy().transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / 8
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = (weights @ v).swapaxes(1, 2).reshape(2, positions, heads * 64)
    np.testing.assert_allclose(reference(qkv, heads).numpy(), want, rtol=1e-9, atol=1e-14)


def test_reference_takes_the_product_as_it_comes() -> None:
    flat = torch.randn(1, 7, 3 * 6 * 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(reference(flat, 6), reference(flat.view(1, 7, 3, 6, 64), 6))


def test_a_tensor_that_is_not_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="on a GPU"):
        encoder_attention(torch.zeros(1, 4, 3, 6, 64, dtype=torch.float16), 6)
