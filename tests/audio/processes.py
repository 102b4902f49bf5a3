"""What /proc says of the processes that this one started."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path


def children(process: int | None = None) -> list[int]:
    """Living children, zombies not counted."""
    parent = os.getpid() if process is None else process
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(entry.name))
    return found


def sandboxes(process: int | None = None) -> list[int]:
    """Children that are forking processes of the sandbox."""
    return [child for child in children(process) if b"serve_app.audio.sandbox" in command(child)]


def decoders() -> list[int]:
    """Processes that decode a recording."""
    return [child for sandbox in sandboxes() for child in children(sandbox)]


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def environment(process: int) -> bytes:
    return Path(f"/proc/{process}/environ").read_bytes()


def transferred(process: int) -> str:
    """What it has read and written so far."""
    return Path(f"/proc/{process}/io").read_text()


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)
