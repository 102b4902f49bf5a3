"""Both ways of each comparison do the same work."""

from __future__ import annotations

import pytest
import torch

from loadtest.gpu.account.__main__ import PARTS
from loadtest.gpu.account.attention import launch_plain
from loadtest.gpu.account.comparison import Setting
from loadtest.gpu.account.uploads import uploaded_before, uploaded_meanwhile
from loadtest.gpu.work import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_batches_uploaded_meanwhile_give_the_same_results() -> None:
    batches = [torch.randn(1 << 20).pin_memory() for _ in range(7)]
    buffers = [torch.empty(1 << 20, device="cuda") for _ in range(2)]

    def compute(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):  # so long that the next copy would overtake it
            x = x.sin()
        return x

    expected = uploaded_before(batches, buffers, compute)
    torch.cuda.synchronize()
    found = uploaded_meanwhile(torch.cuda.Stream(), batches, buffers, compute)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_plain_kernels_are_right_where_they_are_counted() -> None:
    launch_plain()


@pytest.mark.parametrize("part", ["python", "mapped"])
def test_parts_of_single_kernels_have_figures(part: str) -> None:
    rows = PARTS[part](Setting(MODELS["turbo"], "cuda", windows=1, seconds=60))
    assert rows
    assert all(row.times > 0 for row in rows)
