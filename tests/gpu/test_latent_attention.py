"""Latent cross-attention on a GPU, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.latent_attention import (
    HEADS,
    POSITIONS,
    HopperShape,
    LatentAttention,
    Shape,
    dequantise,
    quantise,
    reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


on_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def run(width: int, windows: int, bits: int, cut: Shape | HopperShape | None = None, seed: int = 0) -> float:
    """Relative error of the kernel on fresh input, which has sharp and flat distributions."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device = torch.device("cuda")
    states = torch.randn(windows, POSITIONS, width, device=device, generator=generator).half()
    sharpness = torch.rand(windows, HEADS[width], 1, device=device, generator=generator) * 3
    queries = (torch.randn(windows, HEADS[width], width, device=device, generator=generator) * sharpness / 4).half()
    return error(queries, states, bits, cut)


def error(queries: Tensor, states: Tensor, bits: int, cut: Shape | HopperShape | None = None) -> float:
    """Relative error of the kernel."""
    kernel = LatentAttention(states.shape[2], states.device, bits=bits, cut=cut)
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
@pytest.mark.parametrize("windows", [2, 17, 44, 50, 64, 100, 133, 150])
def test_windows_shared_among_blocks(windows: int, bits: int) -> None:
    assert run(1280, windows, bits, seed=windows) < 2e-3


@pytest.mark.parametrize("cut", [Shape(16, 2), Shape(16, 3), Shape(16, 4), Shape(32, 2)])
def test_cuts_of_smaller_cards(cut: Shape) -> None:
    for bits in (16, 8):
        assert run(1280, 5, bits, cut) < 2e-3


@on_hopper
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("width", "cut"),
    [
        (1280, HopperShape(16, 2)),
        (1280, HopperShape(32, 2)),
        (1280, HopperShape(16, 4)),
        (768, HopperShape(16, 3)),
        (768, HopperShape(32, 4)),
        (512, HopperShape(64, 2)),
        (512, HopperShape(32, 5)),
        (384, HopperShape(16, 8)),
        (384, HopperShape(32, 4)),
    ],
    ids=str,
)
def test_cuts_of_hoppers_kernel(width: int, cut: HopperShape, bits: int) -> None:
    assert run(width, 5, bits, cut) < 2e-3


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("windows", [1, 3, 64])
@pytest.mark.parametrize("towards", ["end", "begin"])
def test_scores_that_grow_and_fall_by_far(towards: str, windows: int, bits: int) -> None:
    # along the positions, so that sums taken so far have to be rescaled again and again, by heads at different times
    generator = torch.Generator("cuda").manual_seed(windows)
    direction = torch.nn.functional.normalize(torch.randn(1280, device="cuda", generator=generator), dim=0)
    height = torch.linspace(0, 20, POSITIONS, device="cuda")
    if towards == "begin":
        height = height.flip(0)
    noise = torch.randn(windows, POSITIONS, 1280, device="cuda", generator=generator)
    states = (noise + height[:, None] * direction * 4).half()
    steepness = torch.rand(windows, 20, 1, device="cuda", generator=generator) * 20
    noise = torch.randn(windows, 20, 1280, device="cuda", generator=generator) / 10
    assert error((noise + direction * steepness).half(), states, bits) < 2e-3


def test_what_lies_behind_a_window_is_not_looked_at() -> None:
    states = torch.full((4, POSITIONS, 1280), torch.nan, device="cuda", dtype=torch.float16)
    states[1:3] = torch.randn(2, POSITIONS, 1280, device="cuda")
    queries = torch.randn(2, 20, 1280, device="cuda", dtype=torch.float16) / 10
    assert error(queries, states[1:3], 16) < 2e-3


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("width", [384, 768, 1280])
def test_parts_are_put_together_in_their_order_whoever_ends_last(width: int, bits: int) -> None:
    generator = torch.Generator("cuda").manual_seed(width)
    states: Tensor = torch.randn(90, POSITIONS, width, device="cuda", generator=generator).half()
    queries = torch.randn(90, HEADS[width], width, device="cuda", generator=generator).half() / 8
    scales = None
    if bits == 8:
        states, scales = quantise(states)
    kernel = LatentAttention(width, queries.device, bits=bits)
    for windows in (46, 90):  # in two and three parts, at borders that move
        first = torch.full_like(queries[:windows], torch.nan)
        arguments = queries[:windows], states[:windows]
        kernel(*arguments, first, scales=None if scales is None else scales[:windows])
        for _ in range(20):
            out = torch.full_like(first, torch.nan)
            kernel(*arguments, out, scales=None if scales is None else scales[:windows])
            assert torch.equal(out.view(torch.int16), first.view(torch.int16))


def test_a_cut_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes of shared memory"):
        LatentAttention(1280, torch.device("cuda"), cut=HopperShape(64, 2))


@pytest.mark.parametrize("bits", [16, 8])
def test_a_graph_gives_the_same_again_and_again(bits: int) -> None:
    kernel = LatentAttention(1280, torch.device("cuda"), bits=bits)
    queries = (
        torch.randn(20, 70, 1280, device="cuda", dtype=torch.float16).transpose(0, 1) / 10
    )  # as the decoder has them
    states: Tensor = torch.randn(70, POSITIONS, 1280, device="cuda", dtype=torch.float16)
    scales = None
    if bits == 8:
        states, scales = quantise(states)
    first, out = torch.empty_like(queries), torch.empty_like(queries)
    kernel(queries, states, first, scales=scales)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(queries, states, out, scales=scales)
    for _ in range(5):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, first)


def test_wrong_input_is_refused() -> None:
    device = torch.device("cuda")
    kernel = LatentAttention(384, device)
    queries = torch.zeros(2, 6, 384, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="states must be"):
        kernel(queries, torch.zeros(2, 1499, 384, device=device, dtype=torch.float16), torch.empty_like(queries))
    with pytest.raises(ValueError, match="16 bits"):
        kernel(queries, torch.zeros(2, 1500, 384, device=device), torch.empty_like(queries))
    shifted = torch.zeros(2 * 6 * 388, device=device, dtype=torch.float16).view(2, 6, 388)[..., :384]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernel(shifted, torch.zeros(2, 1500, 384, device=device, dtype=torch.float16), shifted)
