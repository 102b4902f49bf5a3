"""Turns on a GPU that the stages' processes share.

The driver slices a GPU's time between processes: each that has something to run gets as much as every other, however
little it makes of it. A decoder steps all the time, and an encoder beside it then takes twice as long for a batch,
while the decoder fills half of the GPU's time with steps of half-empty slots. So the stages of one GPU take turns: a
batch, or the steps until another stage can make better use of the GPU, at the GPU's full speed.

A turn is a lock on a file, so that it ends with the process that holds it. Two locks make it fair: who wants the turn
takes the place behind its holder first, and no one else can stand there, not even the holder that has just given it up.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path

LONGEST_S = 0.1
"""After so long a stage gives way to one that waits, whatever it could still do itself."""


class GpuTurns:
    """One process's side. For one thread, but for ``spent``.

    name: of the GPU, its UUID: all processes of one user that name the same take turns. folder: for the locks.
    """

    def __init__(self, name: str, folder: Path | None = None):
        folder = folder or Path(tempfile.gettempdir()) / f"whisper-serve-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._turn, self._next = (_lock_file(folder / f"{name}.{kind}") for kind in ("turn", "next"))
        self._since: float | None = None
        self._wanted_since: float | None = None
        self._waited_s = self._held_s = 0.0  # in turns that have ended, and waits

    @property
    def held(self) -> bool:
        return self._since is not None

    @property
    def held_s(self) -> float:
        """How long it has been held; 0 where it is not."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def take(self) -> None:
        """Waits for the turn, unless it is held already."""
        if self.held:
            return
        self._wanted_since = began = time.monotonic()
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)
        now = time.monotonic()
        self._wanted_since, self._waited_s = None, self._waited_s + now - began
        self._since = now

    def give(self) -> None:
        """Ends the turn. What was launched on the GPU in it should have come to its end."""
        self._held_s, self._since = self._held_s + self.held_s, None
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    def spent(self) -> tuple[float, float]:
        """Seconds so far that it waited for turns, and that it had them."""
        now, wanted, since = time.monotonic(), self._wanted_since, self._since
        waiting, holding = (0.0 if begin is None else now - begin for begin in (wanted, since))
        return self._waited_s + waiting, self._held_s + holding

    @property
    def wanted(self) -> bool:
        """Does another process wait for the turn?"""
        try:
            fcntl.flock(self._next, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._next, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        os.close(self._turn)
        os.close(self._next)


def gives_way(*, held_s: float, free: int, waiting: int, slots: int) -> bool:
    """Should a decoder leave the GPU to a stage that wants it, for windows to fill its free slots with (pure)? Steps
    cost nearly the same however many slots are empty. waiting: windows that wait here for a slot."""
    return free - waiting >= max(1, slots // 16) or held_s >= LONGEST_S


def _lock_file(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
