"""The linear layers' kernel on a Hopper GPU, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import linear as module
from kernels.linear import NARROW, NARROW_FLOATS, WIDE, Tiling, available, linear, reference

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not (torch.cuda.is_available() and available(DEVICE)), reason="needs a Hopper GPU"),
]

WIDTHS = (384, 512, 768, 1024, 1280)
LAYERS = sorted({layer for d in WIDTHS for layer in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))})


def draw(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a residual, with sums of about 1."""
    generator = torch.Generator("cuda").manual_seed(rows * 31 + n * 7 + k)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    return normal(rows, k).half(), (normal(n, k) / k**0.5).half(), normal(n).half(), normal(rows, n) * 8


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def check(rows: int, n: int, k: int) -> None:
    """All ways out, with and without bias, into poisoned memory."""
    x, weight, bias, residual = draw(rows, n, k)
    for b in (bias, None):
        wide = [x.double(), weight.double(), None if b is None else b.double()]
        for gelu in (False, True):
            out = torch.full((rows, n), torch.nan, device=DEVICE, dtype=torch.float16)
            assert linear(x, weight, b, gelu=gelu, out=out) is out
            assert error(out, reference(*wide, gelu=gelu)) < 3e-4  # type: ignore[arg-type]
        expected = reference(*wide, residual=residual.double())  # type: ignore[arg-type]
        summed = residual.clone()
        assert linear(x, weight, b, residual=summed) is summed
        assert error(summed, expected) < 2e-6


@pytest.mark.parametrize("rows", [1, 64, 129, 1500])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 128), (384, 384)])
def test_small(rows: int, n: int, k: int) -> None:
    check(rows, n, k)


@pytest.mark.parametrize("rows", [1500, 4500])
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_layers_of_whisper(rows: int, n: int, k: int) -> None:
    check(rows, n, k)


def test_many_rows() -> None:
    check(96000, 1280, 1280)
    check(24000, 1280, 5120)


@pytest.mark.parametrize("tiling", [NARROW, NARROW_FLOATS, WIDE])
@pytest.mark.parametrize("rows", [1, 1500, 9000])
def test_every_tiling(tiling: Tiling, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plan", lambda *_: tiling)
    check(rows, 640, 1024)


def test_gelu_is_off_by_less_than_rounding() -> None:
    """Every FP16 number from -12 to 12 through a layer that changes nothing."""
    numbers = torch.arange(-(2**15), 2**15, device=DEVICE, dtype=torch.int32)
    x = numbers.to(torch.int16).view(torch.float16)
    x = x[x.abs() <= 12]
    x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(-1, 64)
    actual = linear(x, torch.eye(64, device=DEVICE).half(), gelu=True).double()
    expected = torch.nn.functional.gelu(x.double())
    step = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=2.0**-14))) - 10)
    assert float(((actual - expected).abs() / step).max()) < 0.5 + 0.18


def test_leading_dimensions_are_kept() -> None:
    x, weight, bias, _ = draw(2 * 150, 128, 64)
    assert torch.equal(linear(x.view(2, 150, 64), weight, bias), linear(x, weight, bias).view(2, 150, 128))


def test_no_rows() -> None:
    _, weight, bias, _ = draw(1, 128, 64)
    assert linear(torch.empty(0, 64, device=DEVICE).half(), weight, bias).shape == (0, 128)


def test_it_repeats_to_the_bit() -> None:
    x, weight, bias, residual = draw(4500, 1280, 5120)
    first, second = (linear(x, weight, bias, residual=residual.clone()) for _ in range(2))
    assert torch.equal(first, second)


def test_a_graph_replays_on_new_numbers() -> None:
    x, weight, bias, residual = draw(3000, 1280, 1280)
    inner, out = (torch.empty(3000, 1280, device=DEVICE, dtype=torch.float16) for _ in range(2))
    linear(x, weight, bias, gelu=True)  # compiles
    linear(x, weight, bias, residual=residual.clone())
    summed = residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(x, weight, bias, gelu=True, out=inner)
        linear(inner, weight, bias, residual=summed)
        linear(inner, weight, out=out)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, device=DEVICE, generator=torch.Generator("cuda").manual_seed(seed)))
        summed.copy_(residual)
        graph.replay()
        hidden = reference(x.double(), weight.double(), bias.double(), gelu=True).half().double()
        assert error(inner, hidden) < 4e-4
        assert error(out, reference(inner.double(), weight.double())) < 3e-4
        expected = reference(inner.double(), weight.double(), bias.double(), residual=residual.double())
        assert error(summed, expected) < 2e-6
