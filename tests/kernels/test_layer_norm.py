"""Layer normalisation: what can be said of the kernel without a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.layer_norm import FEW_VECTORS, WIDTHS, add_layer_norm, reference


def test_warps_hold_whole_rows() -> None:
    assert all(width % (128 * FEW_VECTORS) == 0 for width in WIDTHS)


def test_the_reference_changes_the_residual() -> None:
    residual, y, bias = torch.zeros(2, 384), torch.ones(2, 384).half(), torch.full((384,), 2.0).half()
    normalised = reference(residual, y, torch.ones(384), torch.full((384,), 0.5), y_bias=bias)
    assert torch.equal(residual, torch.full((2, 384), 3.0))
    assert torch.equal(normalised, torch.full((2, 384), 0.5).half())


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not 400"):
        add_layer_norm(torch.zeros(1, 400), None, torch.zeros(400), torch.zeros(400))
    with pytest.raises(ValueError, match="goes with a y"):
        add_layer_norm(torch.zeros(1, 384), None, torch.zeros(384), torch.zeros(384), y_bias=torch.zeros(384).half())
    with pytest.raises(ValueError, match="residual must be"):
        add_layer_norm(torch.zeros(1, 384), None, torch.zeros(384), torch.zeros(384))
