"""How a measurement gets a server: one that runs already, or one that it starts and ends."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import httpx

from loadtest import processes

DEFAULT_MODEL = "embedded:base"
READY_TIMEOUT_S = 180.0
END_TIMEOUT_S = 60.0
FATE_TIMEOUT_S = 10.0  # for the processes of a server that has ended to follow it
LOG_LINES = 40


class ServerFailed(Exception):
    """The server did not become ready."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at ``url``. Of one that was not started here, process and start time are unknown."""

    url: str
    pid: int | None = None
    ready_s: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="measure the server that runs there, instead of starting one")
    parser.add_argument("--api-key", help="bearer key, where the server asks for one")


@contextmanager
def serving(url: str | None, model: str = DEFAULT_MODEL) -> Iterator[Server]:
    """The server at ``url``, or else one of our own with that model, which ends with the block. Raises ServerFailed."""
    if url is not None:
        url = url.rstrip("/")
        if not _is_ready(url):
            raise ServerFailed(f"no server is ready at {url} ({url}/readyz)")
        yield Server(url)
        return
    port = free_port()
    command = [*serve_command(), "--port", str(port), "--model", model]
    with started(command, f"http://127.0.0.1:{port}") as server:
        yield server


def serve_command() -> list[str]:
    """The installed ``whisper-serve serve`` of this Python. Raises ServerFailed where it is not installed."""
    script = Path(sys.executable).with_name("whisper-serve")
    if not script.is_file():
        raise ServerFailed(f"{script} is missing: install the project into this environment first")
    return [str(script), "serve"]


@contextmanager
def started(command: Sequence[str], url: str, ready_timeout_s: float = READY_TIMEOUT_S) -> Iterator[Server]:
    """Start ``command`` in a process group of its own, wait until ``url``/readyz answers 200, and end it, with all
    that it started, when the block is left. Raises ServerFailed with the end of its output."""
    with tempfile.TemporaryFile() as log, _termination_unwinds():
        begin = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not _is_ready(url):
                if process.poll() is not None:
                    raise ServerFailed(f"the server ended with status {process.returncode} before it was ready")
                if time.monotonic() - begin > ready_timeout_s:
                    raise ServerFailed(f"the server was not ready after {ready_timeout_s:.0f} s")
                time.sleep(0.1)
            yield Server(url, process.pid, time.monotonic() - begin)
        except ServerFailed as error:
            raise ServerFailed(f"{error}\ncommand: {' '.join(command)}\noutput:\n{_tail(log)}") from None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes], timeout_s: float = END_TIMEOUT_S) -> None:
    """Ask the process to end, and make sure that neither it nor anything it started goes on."""
    family = processes.tree(process.pid) if processes.available() else []
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        print(f"the server did not end within {timeout_s:.0f} s of being asked to", file=sys.stderr)
        process.kill()
        process.wait()
    _await_end(family)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for relative in filter(processes.alive, family):
        with suppress(ProcessLookupError):
            os.kill(relative.pid, signal.SIGKILL)
    _await_end(family)


def _await_end(family: Sequence[processes.Process]) -> None:
    deadline = time.monotonic() + FATE_TIMEOUT_S
    while time.monotonic() < deadline and any(map(processes.alive, family)):
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Leave by an exception on SIGTERM, so that the server we started is ended too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
