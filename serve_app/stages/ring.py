"""Tensors from one process to another on the same GPU, without a way over the host.

The sender has a ring of slots in one piece of device memory, exported once, and an interprocess event for each slot.
A receiver maps the memory once, waits on the GPU for the slot's event, copies what is in the slot and gives it back
(``stages.board``). The memory is not PyTorch's: its allocator would export whole segments with whatever else is in
them. A dead receiver costs a slot its lease; of a dead sender's slots the receiver says that their content is lost.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.batching.messages import InputLost
from serve_app.stages.board import Address, Board, BoardGone, BoardReader

LEASE_S = 60.0
"""A receiver that has not taken a slot's content by then is taken for dead."""

HANDLE_BYTES = 64  # of CUDA's interprocess handles


@dataclass(frozen=True, slots=True)
class RingDescriptor:
    """Names what was put into a slot. gpu: its UUID."""

    gpu: str
    board: Address
    slot: int
    sequence: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gpu_of(device: torch.device) -> str | None:
    """The GPU's UUID; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class RingError(RuntimeError):
    """CUDA refused a call."""


class Ring:
    """The sender's end: slots for tensors of one shape. For one thread and one stream: receivers count on it that what
    was put last was copied last."""

    def __init__(
        self, slots: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, lease_s: float = LEASE_S
    ):
        runtime = _runtime()
        self._shape, self._dtype = tuple(shape), dtype
        gpu = gpu_of(device)
        assert gpu is not None
        self.gpu = gpu
        torch.cuda.init()
        if device.index is not None:
            torch.cuda.set_device(device)
        slot_bytes = _slot_bytes(self._shape, dtype)
        address = int(_checked(runtime.cudaMalloc(slots * slot_bytes)))
        handle = _checked(runtime.cudaIpcGetMemHandle(address))
        self._slots = [_tensor(address + i * slot_bytes, self._shape, dtype, device) for i in range(slots)]
        self._events = [torch.cuda.Event(enable_timing=False, interprocess=True) for _ in range(slots)]
        for event in self._events:
            event.record()  # a handle is of an event that has been recorded
        public = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
        public += b"".join(event.ipc_handle() for event in self._events)
        self._board = Board(slots, public, lease_s)

    def put(self, tensor: Tensor, *, patience_s: float) -> RingDescriptor | None:
        """Copies a tensor into a free slot, in the current stream's order. Waits up to patience_s for one to be free;
        None where none is: the receivers are behind."""
        if tensor.shape != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"the ring holds {self._dtype} {list(self._shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        give_up = time.monotonic() + patience_s
        while (lent := self._board.acquire(now := time.monotonic())) is None:
            if now >= give_up:
                return None
            time.sleep(0.001)
        slot, sequence = lent
        self._slots[slot].copy_(tensor)
        self._events[slot].record()
        return RingDescriptor(self.gpu, self._board.address, slot, sequence, self._shape, self._dtype)


class RingReader:
    """The receiver's end, for the rings of any senders on its GPU. For one thread."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._rings: dict[Address, _OpenRing] = {}

    def read(self, descriptors: Sequence[RingDescriptor]) -> list[Tensor | InputLost]:
        """Copies what the descriptors name, and gives their slots back. Blocks until the copies are there: for the
        sender's work before them, but for nothing of this process's other streams. Copies of one sender's tensors share
        their memory: it comes free with the last of them.

        NOTES: few calls, however many tensors: after each the interpreter may be given to another thread, and where
        that is busy it takes a while to come back."""
        copies: list[Tensor | InputLost] = [InputLost("the lease of a window's slot had ended")] * len(descriptors)
        senders: dict[Address, list[int]] = {}
        for i, descriptor in enumerate(descriptors):
            senders.setdefault(descriptor.board, []).append(i)
        with torch.cuda.stream(self._stream):
            for indices in senders.values():
                self._copy(indices, descriptors, copies)
            copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            copied.record()
        copied.synchronize()
        for i, descriptor in enumerate(descriptors):
            if isinstance(copies[i], Tensor) and not self._rings[descriptor.board].board.take(
                descriptor.slot, descriptor.sequence
            ):
                copies[i] = InputLost("the lease of a window's slot had ended")
        return copies

    def _copy(
        self, indices: Sequence[int], descriptors: Sequence[RingDescriptor], copies: list[Tensor | InputLost]
    ) -> None:
        """Copies those of one sender that are still there, in one piece."""
        try:
            ring = self._open(descriptors[indices[0]])
        except BoardGone as gone:
            for i in indices:
                copies[i] = InputLost(str(gone))
            return
        here = [i for i in indices if ring.board.holds(descriptors[i].slot, descriptors[i].sequence)]
        if not here:
            return
        last = max((descriptors[i] for i in here), key=lambda descriptor: descriptor.sequence)
        ring.events[last.slot].wait(self._stream)
        sources = [ring.slots[descriptors[i].slot] for i in here]
        piece = torch.empty((len(sources), *sources[0].shape), dtype=sources[0].dtype, device=self._device)
        rows = piece.unbind()
        torch._foreach_copy_(rows, sources)
        # it is read on the engine's stream, possibly after its last reference here is gone: until that is done its
        # memory must not be taken for the next copies
        piece.record_stream(torch.cuda.default_stream(self._device))
        for i, row in zip(here, rows, strict=True):
            copies[i] = row

    def _open(self, descriptor: RingDescriptor) -> _OpenRing:
        ring = self._rings.get(descriptor.board)
        if ring is None:
            for address in [address for address, other in self._rings.items() if other.board.is_gone]:
                self._rings.pop(address).close()
            ring = self._rings[descriptor.board] = _OpenRing(descriptor, self._device)
        return ring


class _OpenRing:
    """A sender's ring, mapped here."""

    def __init__(self, descriptor: RingDescriptor, device: torch.device):
        runtime = _runtime()
        self.board = BoardReader(descriptor.board)
        handles = [self.board.public[i : i + HANDLE_BYTES] for i in range(0, len(self.board.public), HANDLE_BYTES)]
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), handles[0], HANDLE_BYTES)
        try:
            lazily = runtime.cudaIpcMemLazyEnablePeerAccess
            self._address = int(_checked(runtime.cudaIpcOpenMemHandle(handle, lazily)))
        except RingError as error:
            # NOTES: between the board and the memory the sender may have died
            raise BoardGone(str(error)) from error
        slot_bytes = _slot_bytes(descriptor.shape, descriptor.dtype)
        self.slots = [
            _tensor(self._address + i * slot_bytes, descriptor.shape, descriptor.dtype, device)
            for i in range(len(handles) - 1)
        ]
        own = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self.events = [torch.cuda.Event.from_ipc_handle(own, handle) for handle in handles[1:]]

    def close(self) -> None:
        self.slots, self.events = [], []
        _checked(_runtime().cudaIpcCloseMemHandle(self._address))


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _checked(results: tuple[Any, ...]) -> Any:
    """What a call of CUDA's runtime returned; RingError where it failed."""
    error, *values = results
    if int(error) != 0:
        raise RingError(f"CUDA: {error.name}")
    return values[0] if values else None


def _slot_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Slots begin at multiples of 256 bytes, as allocations do."""
    return -(-math.prod(shape) * dtype.itemsize // 256) * 256


def _tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor over memory that is not PyTorch's."""
    kind = {torch.float16: "<f2", torch.float32: "<f4"}[dtype]

    class Memory:
        __cuda_array_interface__ = {"version": 3, "typestr": kind, "shape": shape, "data": (address, False)}  # noqa: RUF012

    return torch.as_tensor(Memory(), device=device)
