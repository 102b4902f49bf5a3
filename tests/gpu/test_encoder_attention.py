"""The encoder's self-attention on an NVIDIA GPU, beside float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.encoder_attention import HEADS, encoder_attention, portable_attention, reference, simple_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

Attention = Callable[[Tensor, int], Tensor]
KERNELS: dict[str, Attention] = {
    "encoder": encoder_attention,
    "portable": portable_attention,
    "one_thread_a_score": lambda qkv, heads: simple_attention(qkv, heads, "one_thread_a_score"),
    "shared_keys": lambda qkv, heads: simple_attention(qkv, heads, "shared_keys"),
}


def projections(batch: int, positions: int, heads: int, *, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, positions, 3, heads, 64, device="cuda", generator=generator).mul_(spread).half()


def relative_error(got: Tensor, qkv: Tensor, heads: int) -> float:
    want = reference(qkv.double(), heads)
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize(
    ("batch", "positions", "heads"),
    [(1, 1, 6), (2, 63, 8), (1, 64, 8), (1, 128, 12), (3, 129, 12), (3, 333, 20), (1, 1500, 6)],
    ids=lambda x: str(x),
)
def test_small_shapes(name: str, spread: float, batch: int, positions: int, heads: int) -> None:
    qkv = projections(batch, positions, heads, seed=positions, spread=spread)
    assert relative_error(KERNELS[name](qkv, heads), qkv, heads) < 1e-3


@pytest.mark.parametrize("name", ["encoder", "portable"])
@pytest.mark.parametrize("heads", HEADS)
def test_whisper_shapes(name: str, heads: int) -> None:
    qkv = projections(8, 1500, heads, seed=heads)
    assert relative_error(KERNELS[name](qkv, heads), qkv, heads) < 1e-3


@pytest.mark.parametrize("kernel", [encoder_attention, portable_attention])
@pytest.mark.parametrize("positions", [1500, 4096])
def test_every_element_is_written_and_none_beside_them(
    kernel: Callable[[Tensor, int, Tensor], Tensor], positions: int
) -> None:
    heads = 8
    qkv = projections(2, positions, heads, seed=1)
    place = torch.full((4, positions, heads * 64), float("nan"), dtype=torch.float16, device="cuda")
    kernel(qkv, heads, place[1:3])
    assert place[1:3].isfinite().all()
    assert place[0].isnan().all()
    assert place[3].isnan().all()


def test_small_growing_maxima_rescale_what_was_summed() -> None:
    """Keys that grow towards the front: blocks are taken from the back, so every block raises every row's maximum."""
    heads = 6
    qkv = projections(1, 1000, heads, seed=2)
    qkv[:, :, 0] = qkv[:, :, 0].abs()
    qkv[:, :, 1] = (torch.linspace(6, 0.1, 1000, device="cuda")[None, :, None, None] * qkv[:, :, 1].abs()).half()
    for kernel in (encoder_attention, portable_attention):
        assert relative_error(kernel(qkv, heads), qkv, heads) < 1e-3


def test_small_a_window_with_nan_leaves_the_others_alone() -> None:
    qkv = projections(3, 200, 6, seed=3)
    clean = encoder_attention(qkv, 6)
    qkv[1, 17, 1] = float("nan")
    got = encoder_attention(qkv, 6)
    assert got[1].isnan().any()
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize("kernel", [encoder_attention, portable_attention])
def test_small_a_captured_graph_reads_new_input(kernel: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    qkv, out = projections(2, 300, 8, seed=4), torch.empty(2, 300, 512, dtype=torch.float16, device="cuda")
    kernel(qkv, 8, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(qkv, 8, out)
    qkv.copy_(projections(2, 300, 8, seed=5))
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(out, qkv, 8) < 1e-3


def test_the_same_input_gives_the_same_bits() -> None:
    qkv = projections(16, 1500, 20, seed=6)
    first = encoder_attention(qkv, 20)
    assert all(torch.equal(first, encoder_attention(qkv, 20)) for _ in range(5))


def test_what_does_not_fit_is_refused() -> None:
    qkv = projections(1, 10, 6, seed=7)
    with pytest.raises(ValueError, match="heads"):
        encoder_attention(qkv, 7)
    with pytest.raises(ValueError, match=r"\[batch, positions, 3, 8, 64\]"):
        encoder_attention(qkv, 8)
    with pytest.raises(ValueError, match="contiguous FP16"):
        encoder_attention(qkv.float(), 6)
    with pytest.raises(ValueError, match="out is"):
        encoder_attention(qkv, 6, torch.empty(1, 10, 64, dtype=torch.float16, device="cuda"))
