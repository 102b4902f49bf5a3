"""How tensors get from one stage to the next: descriptors travel through calls, the tensors beside them.

Here they travel through Ray's object store: written once by the producer, mapped read-only by a consumer on the same
machine, copied once to another. The producer owns them, so that they are lost with it (``InputLost``); they are freed
when the last descriptor is dropped.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from torch import Tensor

from serve_app.batching.messages import InputLost

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Names a tensor in the object store."""

    ref: ray.ObjectRef[Any]


def export(tensor: Tensor) -> Descriptor:
    """Puts a tensor into the object store; blocks for the copy. NumPy has no bfloat16: those bits travel as int16."""
    host = tensor.detach().cpu().contiguous()
    return Descriptor(ray.put((host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()))


def export_samples(samples: Array) -> Descriptor:
    """Puts int16 samples into the object store."""
    return Descriptor(ray.put(samples))


async def receive(descriptors: Sequence[Descriptor]) -> list[Array | InputLost]:
    """Fetches what descriptors name: read-only arrays, or InputLost in the place of what has died with its producer."""

    async def fetch(descriptor: Descriptor) -> Array | InputLost:
        try:
            array: Array = await descriptor.ref
            return array
        except ray.exceptions.ObjectLostError as lost:
            return InputLost(str(lost))

    return await asyncio.gather(*map(fetch, descriptors))


def as_tensor(array: Array) -> Tensor:
    """A received array as a CPU tensor that shares its memory; it must not be written to. int16 is bfloat16's bits:
    samples, which are int16 indeed, stay arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch has no read-only tensors
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
