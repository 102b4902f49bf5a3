"""A server's processes, read from /proc: which there are, whether they still live, their memory and CPU time."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
SAMPLE_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """``started`` is in clock ticks after boot: with it, a process id that is used again is another process."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes: all, and those that are not shared with other processes' files or shared memory."""

    resident: int
    private: int


NOTHING = Memory(0, 0)


@dataclass(slots=True)
class Growth:
    """A process's memory when the watch began, and the most that was seen. One that started later held nothing then."""

    process: Process
    title: str
    first: Memory
    peak: Memory

    @property
    def resident(self) -> int:
        return self.peak.resident - self.first.resident

    @property
    def private(self) -> int:
        return self.peak.private - self.first.private


def available() -> bool:
    """Whether this system has a /proc to read."""
    return (PROC / "self" / "stat").exists()


def tree(root: int) -> list[Process]:
    """The process ``root`` and all that descend from it, parents before children; empty where it does not live."""
    children: dict[int, list[Process]] = {}
    found: list[Process] = []
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            process, parent = stat
            children.setdefault(parent, []).append(process)
            if process.pid == root:
                found.append(process)
    for process in found:  # grows while it is walked
        found.extend(children.get(process.pid, ()))
    return found


def alive(process: Process) -> bool:
    stat = _stat(process.pid)
    return stat is not None and stat[0] == process


def memory(pid: int) -> Memory | None:
    """None where the process has ended."""
    try:
        resident, shared = map(int, (PROC / str(pid) / "statm").read_text().split()[1:3])
    except (OSError, ValueError):
        return None
    return Memory(resident * PAGE_BYTES, (resident - shared) * PAGE_BYTES)


def cpu_seconds(pid: int) -> float | None:
    """CPU time of the process, and of those of its children that have ended and been waited for; None where it has
    ended."""
    fields = _fields(pid)
    return None if fields is None else sum(map(int, fields[11:15])) / TICKS_A_SECOND


def title(pid: int) -> str:
    """The command line, as the process itself may have rewritten it."""
    try:
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


class MemoryWatch:
    """Samples the memory of a process and all its descendants, those included that start meanwhile::

    with MemoryWatch(server.pid) as watch:
        ...
    worst = max(watch.growth(), key=lambda growth: growth.resident)
    """

    def __init__(self, root: int, interval_s: float = SAMPLE_INTERVAL_S):
        self._root = root
        self._interval_s = interval_s
        self._seen: dict[Process, Growth] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        for process in tree(self._root):
            now = memory(process.pid) or NOTHING
            self._seen[process] = Growth(process, title(process.pid), now, now)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def growth(self) -> list[Growth]:
        """Largest first."""
        return sorted(self._seen.values(), key=lambda growth: growth.resident, reverse=True)

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        for process in tree(self._root):
            now = memory(process.pid)
            if now is None:
                continue
            seen = self._seen.get(process)
            if seen is None:
                # Not counted yet: until a new process runs its own programme, it shows its parent's memory.
                self._seen[process] = Growth(process, title(process.pid), NOTHING, NOTHING)
                continue
            seen.peak = Memory(max(seen.peak.resident, now.resident), max(seen.peak.private, now.private))
            seen.title = title(process.pid) or seen.title


def _stat(pid: int) -> tuple[Process, int] | None:
    """The process and its parent's id; None where it has ended, waited for or not."""
    fields = _fields(pid)
    return None if fields is None else (Process(pid, int(fields[19])), int(fields[1]))


def _fields(pid: int) -> list[str] | None:
    """Of its line in /proc, from its state on; None where it has ended, waited for or not."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # proc(5): "pid (name) state ppid …", the 14th to 17th fields are CPU time (user, system; ended children's), the
    # 22nd is the start time; the name may hold spaces and brackets.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else fields
