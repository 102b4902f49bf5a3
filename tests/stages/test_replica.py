from __future__ import annotations

import pytest
import torch
from cuda.core._utils.cuda_utils import CUDAError  # cuda-python exports it nowhere else

from serve_app.stages.replica import is_gpu_failure
from serve_app.stages.ring import RingError


@pytest.mark.parametrize("error", [torch.AcceleratorError("address"), CUDAError("launch"), RingError("")])
def test_a_failed_gpu_is_recognised(error: Exception) -> None:
    assert is_gpu_failure(error)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), ValueError("shape"), RuntimeError("sizes differ")])
def test_other_errors_are_the_windows_own(error: Exception) -> None:
    assert not is_gpu_failure(error)
