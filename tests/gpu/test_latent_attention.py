"""Latent cross-attention on a GPU, beside float64."""

from __future__ import annotations

import pytest
import torch

from kernels.latent_attention import HEADS, POSITIONS, LatentAttention, Shape, dequantise, quantise, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run(width: int, windows: int, bits: int, cut: Shape | None = None, seed: int = 0) -> float:
    """Relative error of the kernel on fresh input, which has sharp and flat distributions."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device = torch.device("cuda")
    states = torch.randn(windows, POSITIONS, width, device=device, generator=generator).half()
    sharpness = torch.rand(windows, HEADS[width], 1, device=device, generator=generator) * 3
    queries = (torch.randn(windows, HEADS[width], width, device=device, generator=generator) * sharpness / 4).half()
    kernel = LatentAttention(width, device, bits=bits, cut=cut)
    scales, kept = None, states.double()
    if bits == 8:
        states, scales = quantise(states)
        kept = dequantise(states, scales).double()
    out = torch.full_like(queries, torch.nan)
    kernel(queries, states, out, scales=scales)
    expected = reference(queries.double(), kept)
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("width", list(HEADS))
@pytest.mark.parametrize("windows", [1, 3, 8])
def test_small(width: int, windows: int, bits: int) -> None:
    assert run(width, windows, bits, seed=windows) < 2e-3


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("windows", [2, 17, 64, 100, 133, 150])
def test_windows_shared_among_blocks(windows: int, bits: int) -> None:
    assert run(1280, windows, bits, seed=windows) < 2e-3


@pytest.mark.parametrize("cut", [Shape(16, 2), Shape(16, 3), Shape(16, 4), Shape(32, 2)])
def test_cuts_of_smaller_cards(cut: Shape) -> None:
    for bits in (16, 8):
        assert run(1280, 5, bits, cut) < 2e-3


def test_wrong_input_is_refused() -> None:
    device = torch.device("cuda")
    kernel = LatentAttention(384, device)
    queries = torch.zeros(2, 6, 384, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="states must be"):
        kernel(queries, torch.zeros(2, 1499, 384, device=device, dtype=torch.float16), torch.empty_like(queries))
    with pytest.raises(ValueError, match="16 bits"):
        kernel(queries, torch.zeros(2, 1500, 384, device=device), torch.empty_like(queries))
