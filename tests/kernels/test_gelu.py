"""GELU: what can be said of the kernel without a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.compile import Build, resources
from kernels.gelu import BUILDS, bias_gelu, reference


@pytest.mark.parametrize(("made", "architecture"), [(b, a) for b in BUILDS for a in b.architectures], ids=str)
def test_it_compiles_without_spills(made: Build, architecture: str) -> None:
    assert all(used.spill_bytes == 0 for used in resources(made, architecture).values())


def test_the_reference_adds_the_bias_before_rounding() -> None:
    x, bias = torch.full((1, 8), 2048.0).half(), torch.full((8,), 1.0).half()
    assert torch.equal(reference(x, bias), torch.tensor(2049.0).half().expand(1, 8))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be"):
        bias_gelu(torch.zeros(1, 8))
