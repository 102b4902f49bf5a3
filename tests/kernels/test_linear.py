"""The linear layers' kernel: what can be said of it without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.linear import (
    BUILDS,
    NARROW,
    NARROW_FLOATS,
    OUT_GELU,
    OUT_HALF,
    OUT_RESIDUAL,
    SHARED_LIMIT,
    WIDE,
    available,
    linear,
    plan,
    reference,
)


@given(
    rows=st.integers(1, 200_000),
    n=st.integers(1, 80).map(lambda i: i * 64),
    k=st.integers(1, 80).map(lambda i: i * 64),
    out=st.sampled_from([OUT_HALF, OUT_GELU, OUT_RESIDUAL]),
    processors=st.integers(16, 160),
)
def test_every_plan_is_built_fits_and_covers_the_result(rows: int, n: int, k: int, out: int, processors: int) -> None:
    tiling = plan(rows, n, k, out, processors)
    assert tiling.build(out) in BUILDS
    assert tiling.shared_bytes <= SHARED_LIMIT
    assert tiling.clusters(rows, n) * tiling.cluster * tiling.tile_m * tiling.tile_n >= rows * n


def test_one_window_is_cut_small_enough_for_the_whole_gpu() -> None:
    assert plan(1500, 1280, 5120, OUT_RESIDUAL, 132) == NARROW_FLOATS
    assert plan(24000, 1280, 5120, OUT_RESIDUAL, 132) == WIDE
    assert plan(24000, 1280, 5120, OUT_HALF, 132) == NARROW


def test_the_kernel_is_for_hopper() -> None:
    assert not available(torch.device("cpu"))


def test_the_reference_adds_to_the_residual_in_its_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).half() for size in ((5, 64), (128, 64)))
    residual = torch.randn(5, 128, generator=generator)
    expected = residual.double() + x.double() @ weight.double().T
    assert reference(x, weight, residual=residual) is residual
    assert residual.dtype == torch.float32
    assert (residual - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(100, 64).half()}, "multiples of 64"),
        ({"x": torch.zeros(3, 128).half()}, r"x must be \[..., 64\]"),
        ({"x": torch.zeros(3, 64)}, "x must be contiguous"),
        ({"x": torch.zeros(64, 3).half().T}, "x must be contiguous"),
        ({"bias": torch.zeros(64).half()}, r"bias must be contiguous \[128\]"),
        ({"residual": torch.zeros(3, 128).half()}, "residual must be contiguous .* torch.float32"),
        ({"out": torch.zeros(4, 128).half()}, r"out must be contiguous \[3, 128\]"),
        ({"out": torch.zeros(3 * 128 + 1).half()[1:].view(3, 128)}, "out must be aligned"),
        ({"residual": torch.zeros(3, 128), "gelu": True}, "neither with gelu"),
    ],
)
def test_wrong_input_is_refused(arguments: dict[str, torch.Tensor], message: str) -> None:
    right = {"x": torch.zeros(3, 64).half(), "weight": torch.zeros(128, 64).half()}
    with pytest.raises(ValueError, match=message):
        linear(**{**right, **arguments})  # type: ignore[arg-type]
