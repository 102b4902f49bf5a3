"""Layer normalisation on a GPU, beside float64."""

from __future__ import annotations

import pytest
import torch

from kernels.layer_norm import FEW, WIDTHS, add_layer_norm, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, FEW, FEW + 1, FEW + 13])
@pytest.mark.parametrize("given", ["nothing", "y", "y and its bias"])
def test_small(width: int, rows: int, given: str) -> None:
    # Whisper's residual has a few columns a hundred times as large as the others, and a mean
    residual = (draw(rows, width, seed=rows) + 0.5) * torch.where(torch.arange(width, device="cuda") % 97 == 5, 100, 1)
    y = draw(rows, width, seed=1, dtype=torch.float16) if given != "nothing" else None
    y_bias = draw(width, seed=2, dtype=torch.float16) if given == "y and its bias" else None
    weight, bias = draw(width, seed=3), draw(width, seed=4)
    expected_residual = residual.double()
    expected = reference(expected_residual, y, weight, bias, y_bias=y_bias)

    out = torch.full((rows, width), torch.nan, device="cuda", dtype=torch.float16)
    assert add_layer_norm(residual, y, weight, bias, y_bias=y_bias, out=out) is out
    torch.testing.assert_close(residual.double(), expected_residual, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=6e-4, atol=2e-6)  # half a unit in FP16's last place: 4.9e-4


@pytest.mark.parametrize("rows", [3, FEW + 3])
def test_small_a_mean_far_from_zero_costs_no_digits(rows: int) -> None:
    residual = draw(rows, 1280, seed=5) + 3000
    expected = reference(residual.double(), None, torch.ones(1280, device="cuda"), torch.zeros(1280, device="cuda"))
    out = add_layer_norm(residual, None, torch.ones(1280, device="cuda"), torch.zeros(1280, device="cuda"))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)  # the mean itself has 2e-4


@pytest.mark.parametrize("rows", [2, FEW + 2])
def test_small_rows_without_variance(rows: int) -> None:
    bias = draw(768, seed=6)
    out = add_layer_norm(torch.full((rows, 768), 7.0, device="cuda"), None, torch.ones_like(bias), bias)
    # the mean's last digit, divided by the root of epsilon
    torch.testing.assert_close(out.float(), bias.expand(rows, 768), rtol=5e-4, atol=5e-4)


def test_many_rows_of_an_encoder() -> None:
    residual, y = draw(64, 1500, 1280, seed=7), draw(64, 1500, 1280, seed=8, dtype=torch.float16)
    weight, bias = draw(1280, seed=9), draw(1280, seed=10)
    expected_residual = residual.clone()
    expected = reference(expected_residual, y, weight, bias)
    out = add_layer_norm(residual, y, weight, bias)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=1e-5)


def test_wrong_input_is_refused() -> None:
    residual, weight = torch.zeros(2, 384, device="cuda"), torch.zeros(384, device="cuda")
    with pytest.raises(ValueError, match="y must be"):
        add_layer_norm(residual, torch.zeros(2, 384, device="cuda"), weight, weight)
    with pytest.raises(ValueError, match="weight must be"):
        add_layer_norm(residual, None, weight[:380], weight)
    with pytest.raises(ValueError, match="out must be"):
        add_layer_norm(residual, None, weight, weight, out=torch.zeros(2, 384, device="cuda"))
