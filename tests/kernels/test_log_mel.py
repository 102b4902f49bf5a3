"""Log-mel features: what can be said of the kernel without a GPU."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import whisper.audio
from hypothesis import given
from hypothesis import strategies as st

from kernels.compile import ARCHITECTURES
from kernels.log_mel import (
    ALIGNMENT,
    BINS,
    PAIRS,
    SAMPLE_SCALES,
    LogMelKernel,
    lay_out,
    mel_edges,
    mel_filters,
    mel_steps,
    pack,
    reference,
    share_bands,
    shared_bytes,
)
from serve_app.engine import features
from serve_app.engine.precision import Compute

SHARED_LIMITS = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_100": 227}  # KB a multiprocessor can give to blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sample", SAMPLE_SCALES)
def test_a_block_fits_in_shared_memory(sample: torch.dtype, architecture: str) -> None:
    assert shared_bytes(sample, PAIRS) <= SHARED_LIMITS[architecture] * 1024


def test_three_blocks_share_a_hopper_multiprocessor() -> None:
    assert all(3 * (shared_bytes(sample, PAIRS) + 1024) <= 228 * 1024 for sample in SAMPLE_SCALES)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters_are_those_of_openai_whisper(n_mels: int) -> None:
    assert np.array_equal(mel_filters(n_mels), whisper.audio.mel_filters("cpu", n_mels).numpy())


@pytest.mark.parametrize("n_mels", [80, 128])
def test_edges_hold_all_of_the_filters(n_mels: int) -> None:
    weights, ends = mel_edges(n_mels)
    again = np.zeros_like(mel_filters(n_mels))
    begins = [1, *ends]
    for segment in range(n_mels + 1):
        bins = slice(begins[segment], ends[segment])
        if segment > 0:
            again[segment - 1, bins] = weights[bins, 0]
        if segment < n_mels:
            again[segment, bins] = weights[bins, 1]
    assert np.array_equal(again, mel_filters(n_mels))


@given(counts=st.lists(st.integers(0, 12), min_size=2, max_size=40), parts=st.integers(1, 12))
def test_bands_are_shared_without_gap_and_evenly(counts: list[int], parts: int) -> None:
    ends = (1 + np.cumsum(counts)).tolist()
    bands = len(ends) - 1
    groups = share_bands(ends, parts)
    assert groups[0] == 0
    assert groups[-1] == bands
    assert len(groups) == parts + 1
    assert groups == sorted(groups)

    begins = [1, *ends]
    costs = [begins[b + 1] - begins[a] + 2 * (b - a) for a, b in pairwise(groups)]
    # no group needs to exceed an even share by more than a band with its segments on both sides
    assert max(costs) <= (ends[-1] - 1 + 2 * bands) / parts + 2 * max(counts) + 2


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_warps_steps_apply_the_filters(n_mels: int, parts: int) -> None:
    power = np.random.default_rng(parts).random(BINS)
    found: dict[int, float] = {}
    for program in mel_steps(n_mels, parts):
        falling = rising = 0.0
        for step in program:
            falling += step["falling"] * power[step["bin"]]
            rising += step["rising"] * power[step["bin"]]
            if step["done"] >= 0:
                assert step["done"] not in found
                found[int(step["done"])] = falling
                falling, rising = rising, 0.0
    assert np.allclose([found[band] for band in range(n_mels)], mel_filters(n_mels) @ power, rtol=1e-6)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_the_warps_have_about_the_same_share_of_the_bands(n_mels: int) -> None:
    _, ends = mel_edges(n_mels)
    begins = [1, *ends]
    costs = [begins[b + 1] - begins[a] + 2 * (b - a) for a, b in pairwise(share_bands(ends.tolist(), 5))]
    assert max(costs) < 1.15 * (BINS + 2 * n_mels) / 5


@given(lengths=st.lists(st.integers(1, 480_000), min_size=1, max_size=20), dtype=st.sampled_from(list(SAMPLE_SCALES)))
def test_windows_lie_aligned_and_apart(lengths: list[int], dtype: torch.dtype) -> None:
    offsets, size = lay_out(lengths, dtype)
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    assert all(offset * dtype.itemsize % ALIGNMENT == 0 for offset in offsets)
    assert all(end <= begin for end, begin in zip(ends, [*offsets[1:], size], strict=True))
    assert size < sum(lengths) + len(lengths) * ALIGNMENT


def test_packed_windows_are_where_the_offsets_say() -> None:
    windows = [torch.randint(-1000, 1000, (n,), dtype=torch.int16) for n in (1, 17, 400)]
    samples, offsets, lengths = pack(windows)
    for window, offset, length in zip(windows, offsets, lengths, strict=True):
        assert torch.equal(samples[offset : offset + length], window)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_the_reference_means_what_the_cpu_path_computes(n_mels: int) -> None:
    generator = torch.Generator().manual_seed(n_mels)
    windows = [torch.randint(-3000, 3000, (n,), dtype=torch.int16, generator=generator) for n in (480_000, 50_001, 9)]
    computed = features.LogMel(n_mels, Compute.resolve("cpu", "float32"))([w.numpy() for w in windows])
    torch.testing.assert_close(computed, reference(windows, n_mels).float(), atol=2e-4, rtol=0)


def test_other_numbers_of_bands_are_refused() -> None:
    with pytest.raises(ValueError, match="80 or 128"):
        LogMelKernel(64, torch.device("cpu"))
