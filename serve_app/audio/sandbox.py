"""The process in which strangers' audio is decoded: ``python -m serve_app.audio.sandbox CONTROL LIMITS``.

A Python process with PyAV takes half a second of CPU to start, more than decoding most recordings. So there is one such
process, which decodes nothing itself: it forks a child for each recording, in milliseconds, and the child confines
itself before it reads the first byte. A child that crashes, hangs or is killed harms no other recording.

CONTROL is the number of an inherited SOCK_SEQPACKET socket, which carries JSON, a message a packet:

    to the parent     {"hello": {"av": "18.1.0", "seccomp": null, "leaks": []}}   once, when ready
    from the parent   {"decode": 7}    with two file descriptors: where bytes come from, where samples go
    from the parent   {"kill": 7}
    to the parent     {"exit": 7, "signal": 0, "cpu_seconds": 0.1, "peak_bytes": 73400320}

The child writes frames (see ``protocol``). The socket's end ends the process and all its children.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Never

import av
import av.codec

from serve_app.audio.confine import confine, leaks
from serve_app.audio.protocol import HEADER, MAX_MESSAGE_BYTES, Kind
from serve_app.audio.recording import decode
from serve_app.audio.samples import SAMPLE_RATE, Limits
from serve_app.errors import AudioTooLarge, InvalidAudio


def main(control_number: str, limits_json: str) -> None:
    control = socket.socket(fileno=int(control_number))
    limits = Limits(**json.loads(limits_json))
    _warm_up()
    gc.freeze()  # so that a child's collection does not copy the pages of all that was imported
    _send(control, {"hello": {"av": av.__version__, **_self_test(limits)}})
    _Nursery(control, limits).run()


class _Nursery:
    """Forks, kills and reaps."""

    def __init__(self, control: socket.socket, limits: Limits):
        self._control = control
        self._limits = limits
        self._jobs: dict[int, int] = {}  # by process id
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._woken.fileno():
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(MAX_MESSAGE_BYTES)
                    self._reap()
                elif not self._obey():
                    for process in self._jobs:
                        os.kill(process, signal.SIGKILL)
                    return

    def _obey(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 2)
        if not message:
            return False
        order: dict[str, int] = json.loads(message)
        if "decode" in order:
            source, sink = descriptors
            self._fork(order["decode"], source, sink)
        else:
            for process, job in self._jobs.items():
                if job == order["kill"]:
                    os.kill(process, signal.SIGKILL)
        return True

    def _fork(self, job: int, source: int, sink: int) -> None:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _run_child(lambda: self._child(parent, source, sink))
        self._jobs[child] = job
        os.close(source)
        os.close(sink)

    def _child(self, parent: int, source: int, sink: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for inherited in (self._control, self._woken, self._waker):
            inherited.close()
        confine(parent, self._limits.worker_memory_bytes, self._limits.worker_cpu_seconds)
        decode_to(source, sink, self._limits)

    def _reap(self) -> None:
        while self._jobs:
            child, status, usage = os.wait4(-1, os.WNOHANG)
            if child == 0:
                return
            _send(
                self._control,
                {
                    "exit": self._jobs.pop(child),
                    "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                    "cpu_seconds": usage.ru_utime + usage.ru_stime,
                    "peak_bytes": usage.ru_maxrss * 1024,
                },
            )


def decode_to(source: int, sink: int, limits: Limits) -> None:
    """Decodes what file descriptor ``source`` gives, and writes frames to ``sink``."""
    try:
        for block in decode(lambda size: os.read(source, size), limits):
            _write_frame(sink, Kind.SAMPLES, block.astype("<i2", copy=False).tobytes())
        _write_frame(sink, Kind.END, b"")
    except BrokenPipeError:
        return
    except InvalidAudio as error:
        _write_frame(sink, Kind.INVALID, error.message.encode())
    except AudioTooLarge as error:
        _write_frame(sink, Kind.TOO_LARGE, error.message.encode())
    except Exception as error:
        _write_frame(sink, Kind.FAULT, f"{type(error).__name__}: {error}".encode())


def _write_frame(sink: int, kind: Kind, payload: bytes) -> None:
    frame = memoryview(HEADER.pack(kind, len(payload)) + payload)
    while frame:
        frame = frame[os.write(sink, frame) :]


def _run_child(work: Callable[[], None]) -> Never:
    """Nothing of the parent's may run in a forked child, whatever happens: no handlers, no flushing, no traceback."""
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _warm_up() -> None:
    """Does what every child would otherwise do again, or, confined, could do no more: import what PyAV imports when it
    first meets it, fill the decoders' tables, load the resampler, grow the heap."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for codec in ("aac", "flac", "mp3float", "opus", "vorbis"):
        context: Any = av.codec.CodecContext.create(codec, "r")
        context.sample_rate = 48_000
        with contextlib.suppress(av.error.FFmpegError):  # some need the stream's own headers
            context.open()


def _trial(limits: Limits) -> None:
    """Decodes a tenth of a second of silence; raises where that fails."""
    samples, channels, rate = 4800, 2, 48_000
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    data = b"data" + struct.pack("<I", samples * channels * 2) + bytes(samples * channels * 2)
    wav = b"RIFF" + struct.pack("<I", 4 + len(layout) + len(data)) + b"WAVE" + layout + data
    decoded = sum(len(block) for block in decode(io.BytesIO(wav).read, limits))
    if decoded != samples * SAMPLE_RATE // rate:
        raise RuntimeError(f"a trial recording decoded to {decoded} samples")


def _self_test(limits: Limits) -> dict[str, Any]:
    """Confines a child, decodes in it, and finds what else it can do: "seccomp" is None or why there is no system-call
    filter, "leaks" what it could open, which is nothing where the sandbox holds."""
    _trial(limits)
    report, reply = os.pipe()
    parent = os.getpid()

    def work() -> None:
        seccomp = confine(parent, limits.worker_memory_bytes, limits.worker_cpu_seconds)
        _trial(limits)
        os.write(reply, json.dumps({"seccomp": seccomp, "leaks": leaks()}).encode())

    child = os.fork()
    if child == 0:
        _run_child(work)
    os.close(reply)
    answer = os.read(report, MAX_MESSAGE_BYTES)
    os.close(report)
    _, status = os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(
            f"a process confined to {limits.worker_memory_bytes / 2**20:g} MiB cannot decode (wait status {status:#x})"
        )
    result: dict[str, Any] = json.loads(answer)
    return result


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, which the next read tells
        control.send(json.dumps(message).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
