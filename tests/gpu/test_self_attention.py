"""The decoder's self-attention of one step on a GPU, beside float64."""

from __future__ import annotations

import pytest
import torch

from kernels.self_attention import WIDTHS, SelfAttention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 5, 64])
def test_it_equals_the_reference(width: int, n: int) -> None:
    generator = torch.Generator("cuda").manual_seed(n)
    device = torch.device("cuda")
    keys, values = (torch.randn(n, 448, width, device=device, generator=generator).half() for _ in range(2))
    qkv = torch.randn(n, 3 * width, device=device, generator=generator).half()
    states = torch.zeros(n, 3, dtype=torch.int32, device=device)
    states[:, 1] = torch.randint(0, 448, (n,), device=device, generator=generator)
    states[0, 1] = 0 if n > 1 else 447
    exact = reference(qkv.double(), exact_keys := keys.double(), exact_values := values.double(), states[:, 1])
    mixed = SelfAttention(width, device)(qkv, keys, values, states[:, 1])
    assert float((mixed.double() - exact).norm() / exact.norm()) < 1e-3
    assert torch.equal(keys, exact_keys.half())
    assert torch.equal(values, exact_values.half())
