"""GELU: what can be said of the kernel without a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.gelu import bias_gelu, reference


def test_the_reference_adds_the_bias_before_rounding() -> None:
    x, bias = torch.full((1, 8), 2048.0).half(), torch.full((8,), 1.0).half()
    assert torch.equal(reference(x, bias), torch.tensor(2049.0).half().expand(1, 8))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be"):
        bias_gelu(torch.zeros(1, 8))
