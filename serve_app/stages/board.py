"""What the two ends of a ring (``stages.ring``) tell each other: a page of shared memory. (No CUDA)

The sender owns the page; it vanishes with the sender's process. What is put into slots is numbered as it comes. Each
slot has two of these numbers: of what was last put there, and of what was last taken from it. A slot is free once both
are equal, or when its lease has ended: a receiver that died never answers. Whoever reads a slot looks at its number
afterwards; if it has changed, what was read is not what was meant.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"wsring01"
_HEADER = struct.Struct("<8s16sqqq")  # magic, identity, slots, bytes of the public part, of all


@dataclass(frozen=True, slots=True)
class Address:
    """Where a board is: a file of a process on this machine, and the identity that tells it from a later one there."""

    pid: int
    file: int
    identity: bytes


class BoardGone(Exception):
    """The board's process has ended."""


class Board:
    """The sender's end. public: bytes that receivers need to reach the slots. lease_s: how long a receiver has."""

    def __init__(self, slots: int, public: bytes, lease_s: float):
        begin = -(-(_HEADER.size + len(public)) // 8) * 8
        size = begin + slots * 16
        self._file = os.memfd_create("whisper-serve-ring")
        os.ftruncate(self._file, size)
        self._page = mmap.mmap(self._file, size)
        identity = uuid.uuid4().bytes
        self._page[: _HEADER.size] = _HEADER.pack(MAGIC, identity, slots, len(public), size)
        self._page[_HEADER.size : _HEADER.size + len(public)] = public
        self._sequence, self._taken = _numbers(self._page, slots, begin)
        self._lease_s = lease_s
        self._lent = [float("-inf")] * slots
        self._next = self._put = 0
        self.address = Address(os.getpid(), self._file, identity)

    def acquire(self, now: float) -> tuple[int, int] | None:
        """A free slot and the sequence number of what is put there, from now on lent; None where no slot is free.
        now: seconds on the clock that leases are measured by."""
        slots = len(self._lent)
        for slot in ((self._next + i) % slots for i in range(slots)):
            if self._taken[slot] == self._sequence[slot] or now - self._lent[slot] > self._lease_s:
                self._lent[slot] = now
                self._next = slot + 1
                self._put += 1
                self._sequence[slot] = self._put
                return slot, self._put
        return None

    def close(self) -> None:
        os.close(self._file)


class BoardReader:
    """A receiver's end. Raises BoardGone where there is no such board any more."""

    def __init__(self, address: Address):
        self.address = address
        try:
            with Path(f"/proc/{address.pid}/fd/{address.file}").open("r+b") as file:
                header = file.read(_HEADER.size)
                magic, identity, slots, public, size = _HEADER.unpack(header)
                if (magic, identity) != (MAGIC, address.identity):
                    raise BoardGone(f"process {address.pid} has another board now")
                self.public = file.read(public)
                self._page = mmap.mmap(file.fileno(), size)
        except (OSError, struct.error) as error:
            raise BoardGone(f"process {address.pid} has no such board: {error}") from error
        self._sequence, self._taken = _numbers(self._page, slots, size - slots * 16)

    @property
    def is_gone(self) -> bool:
        """Has the sender ended?"""
        with contextlib.suppress(BoardGone):
            BoardReader(self.address)
            return False
        return True

    def holds(self, slot: int, sequence: int) -> bool:
        """Is what was put there under this number still there?"""
        return bool(self._sequence[slot] == sequence)

    def take(self, slot: int, sequence: int) -> bool:
        """Gives the slot back; False where it had been given to another before, so that what was read is not valid."""
        if not self.holds(slot, sequence):
            return False
        self._taken[slot] = sequence
        return True


def _numbers(page: mmap.mmap, slots: int, begin: int) -> Sequence[np.ndarray[Any, Any]]:
    numbers = np.frombuffer(page, dtype=np.int64, count=2 * slots, offset=begin)
    return numbers[:slots], numbers[slots:]
