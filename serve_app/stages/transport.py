"""How tensors get from one stage to the next: descriptors travel through calls, the tensors beside them.

Samples, which no stage has made, travel in the call itself: a reference of their own would cost its owner and its
borrower messages, and whoever sends them again still has them.

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
Sent = Descriptor | Array
"""What a call carries of an input: its name, or samples."""


def export(tensor: Tensor) -> StoredDescriptor:
    """Puts a tensor into the object store; blocks for the copy. NumPy has no bfloat16: those bits travel as int16."""
    host = tensor.detach().cpu().contiguous()
    return StoredDescriptor(ray.put((host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()))


KEPT_S = 10.0
"""How long a producer keeps what it put into the object store, at the least.

NOTES: a caller's hold on a reference that came inside a streamed item may never reach the owner
(https://github.com/ray-project/ray/issues/58080); then the producer's own is the only one, and without it the object is
gone. What waits for longer, in an overload, can still be lost: its window begins again.
"""


PATIENCE_S = 30.0
"""How long a consumer waits for an input: for one whose owner is unsure of it, Ray waits for ever."""


class Exporter:
    """The producer's side, for results of one shape. ring_windows: slots of its ring, where it is on a GPU. In two
    steps, because who waits must not keep the GPU from those that it waits for."""

    def __init__(self, device: torch.device, ring_windows: int):
        self._kept: deque[tuple[float, StoredDescriptor]] = deque()
        self._device, self._ring_windows = device, ring_windows
        self._gpu = gpu_of(device)
        self._ring: Ring | None = None

    def begin(self, tensors: Tensor, consumers: Sequence[Collection[str]]) -> list[Descriptor | None]:
        """Puts results into the ring, in the current stream's order, as far as it has room; None for the others.

        tensors: [n, …]; consumers: for each, the GPUs on which the next stage can take it."""
        return [self._put(tensor, gpus, patience_s=0.0) for tensor, gpus in zip(tensors, consumers, strict=True)]

    def finish(
        self, tensors: Tensor, consumers: Sequence[Collection[str]], begun: Sequence[Descriptor | None]
    ) -> list[Descriptor]:
        """All results' descriptors: those that ``begin`` gave, and for the others now. Blocks."""
        return [
            descriptor or self._put(tensor, gpus, patience_s=RING_PATIENCE_S) or self._keep(export(tensor))
            for tensor, gpus, descriptor in zip(tensors, consumers, begun, strict=True)
        ]

    def _put(self, tensor: Tensor, gpus: Collection[str], *, patience_s: float) -> RingDescriptor | None:
        if self._gpu is None or self._gpu not in gpus:
            return None
        if self._ring is None:
            self._ring = Ring(self._ring_windows, tensor.shape, tensor.dtype, self._device)
        return self._ring.put(tensor, patience_s=patience_s)

    def _keep(self, descriptor: StoredDescriptor) -> StoredDescriptor:
        now = time.monotonic()
        while self._kept and now - self._kept[0][0] > KEPT_S:
            self._kept.popleft()
        self._kept.append((now, descriptor))
        return descriptor


@dataclass(frozen=True, slots=True)
class Incoming:
    """An input on its way. in_ring: it comes with the engine's next ``Receiver.read_rings``, else by itself."""

    future: concurrent.futures.Future[Input | InputLost]
    in_ring: bool

    @property
    def is_at_hand(self) -> bool:
        """Will whoever begins now not have to wait for it?"""
        return self.in_ring or self.future.done()


class Receiver:
    """The consumer's side."""

    def __init__(self, device: torch.device):
        self._device = device
        self._rings: RingReader | None = None
        self._in_rings: deque[tuple[RingDescriptor, concurrent.futures.Future[Input | InputLost]]] = deque()
        self._fetches: set[asyncio.Task[None]] = set()

    def __call__(self, sent: Sent) -> Incoming:
        """Fetches what a descriptor names; on the event loop."""
        future: concurrent.futures.Future[Input | InputLost] = concurrent.futures.Future()
        if isinstance(sent, RingDescriptor):
            self._in_rings.append((sent, future))
            return Incoming(future, in_ring=True)
        if isinstance(sent, np.ndarray):
            future.set_result(sent)
            return Incoming(future, in_ring=False)
        fetch = asyncio.get_running_loop().create_task(_fetch(sent, future))
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)
        return Incoming(future, in_ring=False)

    def read_rings(self) -> None:
        """Copies all that is in rings; on the engine's thread, which should have its turn on the GPU: a copy beside
        another process's work costs that one or two milliseconds. Blocks."""
        due = [self._in_rings.popleft() for _ in range(len(self._in_rings))]
        if not due:
            return
        if self._rings is None:
            self._rings = RingReader(self._device)
        try:
            read = self._rings.read([descriptor for descriptor, _ in due])
        except torch.OutOfMemoryError as error:
            read = [InputLost(f"there was no memory for the input: {error}")] * len(due)
        for (_, future), received in zip(due, read, strict=True):
            future.set_result(received)


async def _fetch(descriptor: StoredDescriptor, future: concurrent.futures.Future[Input | InputLost]) -> None:
    try:
        future.set_result(await _stored(descriptor))
    except Exception as error:
        future.set_exception(error)


async def _stored(descriptor: StoredDescriptor) -> Array | InputLost:
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
