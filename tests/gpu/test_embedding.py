"""The decoder's input on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.embedding import WIDTHS, embed, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 37])
def test_it_equals_the_reference_bit_for_bit(width: int, n: int) -> None:
    generator = torch.Generator("cuda").manual_seed(n)
    tokens_table = torch.randn(51866, width, device="cuda", generator=generator).half()
    positions_table = torch.randn(448, width, device="cuda", generator=generator)
    states = torch.randint(0, 51866, (n, 5), device="cuda", generator=generator, dtype=torch.int32)
    states[:, 0] %= 460  # some behind the last
    states[0, 0] = 448
    arguments = tokens_table, positions_table, states[:, 3], states[:, 0]
    assert torch.equal(embed(*arguments), reference(*arguments))
