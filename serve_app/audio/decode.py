"""Decodes recordings in sandboxed processes, from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from serve_app.audio.protocol import HEADER, MAX_PAYLOAD_BYTES, Kind
from serve_app.audio.samples import SAMPLE_RATE, Int16, Limits
from serve_app.audio.zygote import STOP_TIMEOUT_S, Exit, Job, SandboxReport, Zygote
from serve_app.errors import AudioTooLarge, InvalidAudio, ServiceError
from serve_app.settings import AudioSettings

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Usage:
    """What decoding has cost so far: CPU over all recordings, and the memory of the largest process."""

    recordings: int = 0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


class _Killed(Exception):
    """The process was killed, by whom is not known; nothing suggests the recording."""


class AudioDecoder:
    """Decodes recordings, each in a process of its own, at most ``settings.workers`` at once. Belongs to one event
    loop. Usable as an async context manager."""

    def __init__(self, settings: AudioSettings):
        self._settings = settings
        self._limits = Limits.of(settings)
        self._slots = asyncio.Semaphore(settings.workers)
        self._starting = asyncio.Lock()
        self._zygote: Zygote | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False
        self._usage = Usage()

    async def start(self) -> None:
        """Starts the process that forks the others. Raises ServiceError where the sandbox cannot be had."""
        await self._ready()

    async def close(self) -> None:
        """Ends all processes. Recordings in progress end with ServiceError."""
        self._closed = True
        async with self._starting:
            if self._zygote is not None:
                await self._zygote.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def report(self) -> SandboxReport | None:
        """None before ``start``."""
        return self._zygote.report if self._zygote else None

    @property
    def usage(self) -> Usage:
        return self._usage

    async def decode(self, source: bytes | BinaryIO) -> AsyncGenerator[Int16, None]:
        """Yields the recording at 16 kHz, mono, int16 [n], in blocks of about a second.

        source: the encoded recording, or a binary file, read in a thread from where it stands and not closed.

        Raises InvalidAudio (not audio, damaged from the start, crashes the decoder, or makes no progress for
        ``stall_timeout_s`` while a block is wanted) and AudioTooLarge (a cap was passed). Closing the iterator early
        ends the process. If the process is killed from outside, decoding starts once more, where the source can be
        read again, and goes on after the blocks already given.
        """
        rewind = _rewinder(source)
        async with self._slots:
            delivered = 0
            for attempt in (1, 2):
                try:
                    async with contextlib.aclosing(self._decode_once(source, delivered)) as blocks:
                        async for block in blocks:
                            delivered += len(block)
                            yield block
                    return
                except _Killed:
                    if self._closed:
                        raise _closed() from None
                    if attempt == 2 or rewind is None:
                        raise ServiceError(
                            "The process that decoded the audio was killed.", code="decoder_died"
                        ) from None
                    logger.warning("a process that decoded audio was killed; the recording is decoded once more")
                    rewind()

    async def _ready(self) -> Zygote:
        async with self._starting:
            if self._closed:
                raise _closed()
            if self._zygote is None or self._zygote.gone:
                if self._zygote is not None:
                    logger.error("the process that forks the audio decoders ended; another is started")
                    await self._zygote.close()
                self._zygote = await Zygote.spawn(self._limits)
                _log_report(self._zygote.report)
            return self._zygote

    async def _decode_once(self, source: bytes | BinaryIO, skip: int) -> AsyncGenerator[Int16, None]:
        if isinstance(source, bytes):
            self._limits.check_upload(len(source))
        zygote = await self._ready()
        try:
            job = zygote.fork(self._account)
        except ConnectionError as error:
            raise _Killed from error
        feeder = asyncio.create_task(self._feed(source, job))
        try:
            async for block in self._blocks(job):
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))
        finally:
            ending = asyncio.create_task(_end(job, feeder))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            await asyncio.shield(ending)  # it goes on if the caller is cancelled twice

    async def _feed(self, source: bytes | BinaryIO, job: Job) -> None:
        """Writes the source to the process until it wants no more."""
        size = 0
        try:
            async for chunk in _chunks(source):
                size += len(chunk)
                self._limits.check_upload(size)
                while chunk:
                    await _writable(job.input)
                    try:
                        chunk = chunk[os.write(job.input, chunk) :]
                    except BrokenPipeError:
                        return
                    job.progress()
            job.close(job.input)
        except Exception as error:  # raised where the blocks are wanted: half a source is no recording
            job.failure = error
            job.kill()

    async def _blocks(self, job: Job) -> AsyncIterator[Int16]:
        """The blocks that the process sends. It has read a stranger's bytes and may be anyone's by now: nothing it
        says is taken on trust."""
        most = int((self._limits.max_seconds + 1) * SAMPLE_RATE)
        frames = _Frames(job, self._settings.stall_timeout_s)
        while True:
            try:
                kind, payload = await frames.next()
            except EOFError:
                raise await _post_mortem(job) from None
            if kind == Kind.SAMPLES and len(payload) % 2 == 0:
                block = np.frombuffer(payload, "<i2").astype(np.int16, copy=False)
                most -= len(block)
                if most < 0:
                    raise _fault("more samples than the limit")
                yield block
            elif kind == Kind.END:
                return
            elif kind == Kind.INVALID:
                raise job.failure or InvalidAudio(_printable(payload))
            elif kind == Kind.TOO_LARGE:
                raise AudioTooLarge(_printable(payload))
            else:
                raise _fault(_printable(payload))

    def _account(self, exited: asyncio.Future[Exit | None]) -> None:
        if exit_ := exited.result():
            self._usage = Usage(
                self._usage.recordings + 1,
                self._usage.cpu_seconds + exit_.cpu_seconds,
                max(self._usage.peak_bytes, exit_.peak_bytes),
            )


class _Frames:
    """Frames from a process's output. The time without progress counts while a frame is waited for: neither a slow
    consumer nor a long upload is a stall."""

    def __init__(self, job: Job, stall_timeout_s: float):
        self._job = job
        self._stall_timeout_s = stall_timeout_s
        self._buffer = bytearray()

    async def next(self) -> tuple[int, bytes]:
        """Raises EOFError where the output ends, InvalidAudio on a stall."""
        self._job.progress()
        kind, length = HEADER.unpack(await self._take(HEADER.size))
        if length > MAX_PAYLOAD_BYTES:
            raise _fault(f"a frame of {length} bytes")
        return kind, await self._take(length)

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._readable()
            data = os.read(self._job.output, READ_BYTES)
            if not data:
                raise EOFError
            self._job.progress()
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            left = self._job.progress_at + self._stall_timeout_s - loop.time()
            if left <= 0:
                raise InvalidAudio(f"Decoding took too long: no progress in {self._stall_timeout_s:g} seconds.")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    return await _wait(self._job.output, loop.add_reader, loop.remove_reader)


async def _end(job: Job, feeder: asyncio.Task[None]) -> None:
    job.kill()
    feeder.cancel()
    await asyncio.wait([feeder])
    await job.end()


async def _post_mortem(job: Job) -> Exception:
    """Why the output ended before the recording did."""
    await asyncio.wait([job.exited], timeout=STOP_TIMEOUT_S)
    exit_ = job.exited.result() if job.exited.done() else None
    if job.failure is not None:
        return job.failure
    if exit_ is None or exit_.signal == signal.SIGKILL:
        return _Killed()
    if exit_.signal == signal.SIGXCPU:
        return InvalidAudio("Decoding took too long: the limit of CPU time was reached.")
    if exit_.signal:
        return InvalidAudio(f"The audio is damaged such that its decoder crashed ({signal.strsignal(exit_.signal)}).")
    return _fault("it ended without a word")


async def _chunks(source: bytes | BinaryIO) -> AsyncIterator[memoryview]:
    if isinstance(source, bytes):
        yield memoryview(source)
        return
    while True:
        reading = asyncio.create_task(asyncio.to_thread(source.read, CHUNK_BYTES))
        try:
            data = await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait([reading])  # the caller may close or rewind the file next
            raise
        if not data:
            return
        yield memoryview(data)


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    await _wait(descriptor, loop.add_writer, loop.remove_writer)


async def _wait(descriptor: int, register: Callable[..., Any], unregister: Callable[[int], Any]) -> None:
    ready = asyncio.Event()
    register(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        unregister(descriptor)


def _rewinder(source: bytes | BinaryIO) -> Callable[[], object] | None:
    """What makes the source ready to be read again, or None where it cannot be."""
    if isinstance(source, bytes):
        return lambda: None
    if not source.seekable():
        return None
    start = source.tell()
    return lambda: source.seek(start)


def _log_report(report: SandboxReport | None) -> None:
    assert report is not None
    if report.seccomp is not None:
        logger.warning("audio is decoded without a system-call filter: %s", report.seccomp)
    if report.leaks:
        logger.error("the audio sandbox leaks: a decoding process can %s", ", ".join(report.leaks))


def _printable(message: bytes) -> str:
    text = message[:1000].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text)[:500]


def _fault(what: str) -> ServiceError:
    logger.error("a process that decoded audio misbehaved: %s", what)
    return ServiceError("The audio decoder failed.", code="decoder_fault")


def _closed() -> ServiceError:
    return ServiceError("The audio decoder is shut down.", code="decoder_closed")
