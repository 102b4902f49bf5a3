"""Bias and GELU on a GPU, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.gelu import bias_gelu, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def places_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many FP16 numbers lie from a to b."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(a) - ordered(b)).abs()


def exact(x: Tensor) -> Tensor:
    """x Φ(x), without the cancellation that 1 + erf has for negative x."""
    return x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2


def test_small_all_finite_inputs() -> None:
    x = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    apart = places_apart(bias_gelu(x.view(-1, 8)).flatten(), exact(x).half())
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) < 100  # of 63,488: where the exact value lies almost between two numbers


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1, 1536), (3, 2048), (7, 5120), (257, 3072)])
@pytest.mark.parametrize("biased", [False, True])
def test_small(rows: int, width: int, biased: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    x = (3 * torch.randn(rows, width, device="cuda", generator=generator)).half()
    bias = torch.randn(width, device="cuda", generator=generator).half() if biased else None
    out = torch.full_like(x, torch.nan)
    assert bias_gelu(x, bias, out) is out
    total = x.double() if bias is None else x.double() + bias.double()
    torch.testing.assert_close(out.double(), exact(total), rtol=5e-4, atol=4e-8)
    torch.testing.assert_close(out, reference(x, bias), rtol=2e-3, atol=1e-5)
    assert torch.equal(bias_gelu(x, bias, x), out)  # in place


def test_small_a_missing_number_is_seen() -> None:
    x = torch.zeros(1, 8, device="cuda", dtype=torch.float16)
    x[0, 3] = torch.nan
    assert bias_gelu(x).isnan().flatten().tolist() == [False] * 3 + [True] + [False] * 4


def test_rows_of_an_encoder() -> None:
    generator = torch.Generator("cuda").manual_seed(9)
    x = torch.randn(30, 1500, 5120, device="cuda", generator=generator, dtype=torch.float16)
    bias = torch.randn(5120, device="cuda", generator=generator, dtype=torch.float16)
    torch.testing.assert_close(bias_gelu(x, bias), reference(x, bias), rtol=2e-3, atol=1e-5)


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(2, 16, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="multiple of 8"):
        bias_gelu(x[:, :4].contiguous())
    with pytest.raises(ValueError, match="bias must be"):
        bias_gelu(x, x[0, :8])
    with pytest.raises(ValueError, match="x must be"):
        bias_gelu(x.float())
