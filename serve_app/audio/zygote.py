"""The parent's end of the sandbox: starts the process that forks, and knows the processes forked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from serve_app.audio.protocol import MAX_MESSAGE_BYTES
from serve_app.audio.samples import Limits
from serve_app.errors import ServiceError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
INPUT_PIPE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class SandboxReport:
    """What holds a decoding process. ``seccomp`` is None, or why there is no system-call filter; ``leaks`` is what
    such a process could open in a trial all the same."""

    av: str
    seccomp: str | None
    leaks: list[str]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a decoding process ended: the signal that ended it (0 for none), and what it took."""

    signal: int
    cpu_seconds: float
    peak_bytes: int


@dataclass(slots=True, eq=False)
class Job:
    """One forked process. ``exited`` is set once it is reaped, to None if that cannot be known any more."""

    zygote: Zygote
    number: int
    input: int
    output: int
    exited: asyncio.Future[Exit | None]
    progress_at: float
    failure: Exception | None = None
    _open: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._open = {self.input, self.output}

    def progress(self) -> None:
        self.progress_at = asyncio.get_running_loop().time()

    def close(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.remove(descriptor)
            os.close(descriptor)

    async def end(self) -> None:
        """Kills the process if it still runs, and waits until it is reaped."""
        self.kill()
        self.close(self.input)
        self.close(self.output)
        done, _ = await asyncio.wait([self.exited], timeout=STOP_TIMEOUT_S)
        if not done:
            self.zygote.abort()

    def kill(self) -> None:
        if not self.exited.done():
            self.zygote.send({"kill": self.number})


class Zygote:
    """One started process of ``serve_app.audio.sandbox``."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket):
        self._process = process
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, Job] = {}
        self._numbers = 0
        self._hello: asyncio.Future[SandboxReport | None] = self._loop.create_future()
        self.gone = False
        self.report: SandboxReport | None = None
        self._loop.add_reader(control.fileno(), self._receive)

    @classmethod
    async def spawn(cls, limits: Limits) -> Self:
        """Starts the process, with an environment that holds no secrets. Raises ServiceError if it cannot run."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-P", "-m", "serve_app.audio.sandbox"]
        arguments = [str(theirs.fileno()), json.dumps(dataclasses.asdict(limits))]
        with theirs:
            process = subprocess.Popen(  # noqa: S603, ASYNC220
                command + arguments,
                env=_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        zygote = cls(process, ours)
        try:
            await asyncio.wait([zygote._hello], timeout=START_TIMEOUT_S)
        finally:
            zygote.report = zygote._hello.result() if zygote._hello.done() else None
            if zygote.report is None:
                zygote.abort()
        if zygote.report is None:
            await zygote.close()
            raise ServiceError(
                f"The sandbox that decodes audio did not start (exit status {process.returncode}); its own words are "
                "in the log.",
                code="sandbox_unavailable",
            )
        return zygote

    def fork(self, done: Callable[[asyncio.Future[Exit | None]], None]) -> Job:
        """Starts a process for one recording; ``done`` gets its ``exited`` future. Raises ConnectionError if the
        forking process is gone."""
        source, input_ = os.pipe()
        output, sink = os.pipe()
        try:
            with contextlib.suppress(OSError):  # a larger pipe is only faster
                fcntl.fcntl(input_, fcntl.F_SETPIPE_SZ, INPUT_PIPE_BYTES)
            os.set_blocking(input_, False)
            os.set_blocking(output, False)
            self._numbers += 1
            socket.send_fds(self._control, [json.dumps({"decode": self._numbers}).encode()], [source, sink])
        except OSError as error:
            os.close(input_)
            os.close(output)
            self.abort()
            raise ConnectionError("the sandbox does not answer") from error
        finally:
            os.close(source)
            os.close(sink)
        job = Job(self, self._numbers, input_, output, self._loop.create_future(), self._loop.time())
        job.exited.add_done_callback(done)
        self._jobs[job.number] = job
        return job

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            self.abort()

    def abort(self) -> None:
        """Kills the process, and by that all that it forked."""
        self._process.kill()
        self._end()

    async def close(self) -> None:
        """Ends the process and all that it forked, and waits for it."""
        self._end()
        try:
            await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _receive(self) -> None:
        try:
            data = self._control.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            self._process.poll()
            return
        message: dict[str, Any] = json.loads(data)
        if "hello" in message:
            self._hello.set_result(SandboxReport(**message["hello"]))
        elif job := self._jobs.pop(message.pop("exit"), None):
            job.exited.set_result(Exit(**message))

    def _end(self) -> None:
        if self.gone:
            return
        self.gone = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        if not self._hello.done():
            self._hello.set_result(None)
        for job in self._jobs.values():
            job.exited.set_result(None)
        self._jobs.clear()


def _environment() -> dict[str, str]:
    """Finds the modules where this process finds them, and keeps numerical libraries to one thread: a process with
    threads cannot be forked safely."""
    environment = {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),  # noqa: PTH100
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    for name in ("LD_LIBRARY_PATH", "LANG"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment
