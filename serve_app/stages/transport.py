"""How tensors get from one stage to the next: descriptors travel through calls, the tensors beside them.

Between replicas on one GPU they go through a ring in its memory (``stages.ring``); else through Ray's object store:
written once by the producer, mapped read-only by a consumer on the same machine, copied once to another. The producer
owns them either way, so that they are lost with it (``InputLost``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from torch import Tensor

from serve_app.batching.messages import InputLost
from serve_app.engine.tensors import as_tensor
from serve_app.stages.ring import Ring, RingDescriptor, RingReader, gpu_of

Array = np.ndarray[Any, Any]
Input = Array | Tensor
"""What a stage receives: from the object store a read-only array, from a ring a tensor on the GPU."""

RING_PATIENCE_S = 5.0
"""How long a producer waits for a free slot of its ring, which makes it as slow as its consumers, before it takes the
object store."""


@dataclass(frozen=True, slots=True)
class StoredDescriptor:
    """Names a tensor in the object store; it is freed when the last descriptor is dropped."""

    ref: ray.ObjectRef[Any]


Descriptor = StoredDescriptor | RingDescriptor


def export(tensor: Tensor) -> StoredDescriptor:
    """Puts a tensor into the object store; blocks for the copy. NumPy has no bfloat16: those bits travel as int16."""
    host = tensor.detach().cpu().contiguous()
    return StoredDescriptor(ray.put((host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()))


def export_samples(samples: Array) -> StoredDescriptor:
    """Puts int16 samples into the object store."""
    return StoredDescriptor(ray.put(samples))


KEPT_S = 10.0
"""How long a producer keeps what it put into the object store, at the least.

NOTES: a caller's hold on a reference that came inside a streamed item may never reach the owner
(https://github.com/ray-project/ray/issues/58080); then the producer's own is the only one, and without it the object is
gone. What waits for longer, in an overload, can still be lost: its window begins again.
"""


PATIENCE_S = 30.0
"""How long a consumer waits for an input: for one whose owner is unsure of it, Ray waits for ever."""


class Exporter:
    """The producer's side, for results of one shape. ring_windows: slots of its ring, where it is on a GPU."""

    def __init__(self, device: torch.device, ring_windows: int):
        self._kept: deque[tuple[float, StoredDescriptor]] = deque()
        self._device, self._ring_windows = device, ring_windows
        self._gpu = gpu_of(device)
        self._ring: Ring | None = None

    def __call__(self, tensors: Tensor, consumers: Sequence[Collection[str]]) -> list[Descriptor]:
        """tensors: [n, …]; consumers: for each, the GPUs on which the next stage can take it. Blocks."""
        return [self._export(tensor, gpus) for tensor, gpus in zip(tensors, consumers, strict=True)]

    def _export(self, tensor: Tensor, gpus: Collection[str]) -> Descriptor:
        if self._gpu is not None and self._gpu in gpus:
            if self._ring is None:
                self._ring = Ring(self._ring_windows, tensor.shape, tensor.dtype, self._device)
            descriptor = self._ring.put(tensor, patience_s=RING_PATIENCE_S)
            if descriptor is not None:
                return descriptor
        return self._keep(export(tensor))

    def _keep(self, descriptor: StoredDescriptor) -> StoredDescriptor:
        now = time.monotonic()
        while self._kept and now - self._kept[0][0] > KEPT_S:
            self._kept.popleft()
        self._kept.append((now, descriptor))
        return descriptor


class Receiver:
    """The consumer's side."""

    def __init__(self, device: torch.device):
        self._device = device
        self._rings: RingReader | None = None
        # a reader belongs to one thread, and waits for copies there: the engine's goes on
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="receive")

    async def __call__(self, descriptors: Sequence[Descriptor]) -> list[Input | InputLost]:
        """Fetches what the descriptors name, or says InputLost in its place."""
        in_rings = [d for d in descriptors if isinstance(d, RingDescriptor)]
        stored = [_fetch(d) for d in descriptors if isinstance(d, StoredDescriptor)]
        reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read, in_rings)
        copied, fetched = (iter(inputs) for inputs in await asyncio.gather(reading, asyncio.gather(*stored)))
        return [next(copied if isinstance(d, RingDescriptor) else fetched) for d in descriptors]

    def _read(self, descriptors: Sequence[RingDescriptor]) -> list[Tensor | InputLost]:
        if not descriptors:
            return []
        if self._rings is None:
            self._rings = RingReader(self._device)
        return self._rings.read(descriptors)


async def _fetch(descriptor: StoredDescriptor) -> Array | InputLost:
    try:
        async with asyncio.timeout(PATIENCE_S):
            array: Array = await descriptor.ref
        return array
    except ray.exceptions.ObjectLostError as lost:
        return InputLost(str(lost))
    except TimeoutError:
        return InputLost(f"the input has not come within {PATIENCE_S:g} s")


def received_tensor(received: Input) -> Tensor:
    """What was received as a tensor, which must not be written to. int16 is bfloat16's bits: samples, which are int16
    indeed, stay arrays."""
    if isinstance(received, Tensor):
        return received
    tensor = as_tensor(received)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
