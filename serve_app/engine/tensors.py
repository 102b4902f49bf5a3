"""Arrays as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A CPU tensor that shares the array's memory. The array may be read-only, as those of Ray's object store are: then
    the tensor must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch has no read-only tensors
        return torch.from_numpy(array)
