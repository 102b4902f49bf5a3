"""Client processes that keep the application busy, through its Ray handle or over HTTP.

Several, because one Python process cannot hand over hundreds of recordings a second.
"""

from __future__ import annotations

import asyncio
import io
import math
import multiprocessing
import time
import wave
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any, Generic, Literal, TypeVar

import httpx
import numpy as np
import numpy.typing as npt

from loadtest import traffic

Way = Literal["handle", "http"]
Samples = npt.NDArray[np.int16]
T = TypeVar("T")

RATE = 16_000
READY_S = 300.0  # for a client to start and to warm up


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients send.

    address: of the Ray cluster, or the application's URL. recordings: a file of numpy's, int16 [k, samples], one window
    each, taken in turn. concurrency: windows under way at once, of all processes together.
    """

    way: Way
    address: str
    app_name: str
    recordings: Path
    windows: int
    concurrency: int
    processes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: of all segments. temperature: the highest that was needed. at: when it came (time.time)."""

    tokens: int = 0
    temperature: float = 0.0
    error: str | None = None
    at: float = field(default_factory=time.time, compare=False)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """before, after: what was looked at when all were ready and when the last answer had come."""

    answers: list[Answer]
    wall_s: float
    before: T
    after: T


def run(load: Load, look: Callable[[], T]) -> Outcome[T]:
    """Every process warms up with as many windows as it will have under way; then all begin at once. An error of a
    client is raised here."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(load.processes + 1)
    with ProcessPoolExecutor(load.processes, context, _keep, (barrier,)) as pool:
        futures = [pool.submit(_client, load, part) for part in range(load.processes)]
        with suppress(BrokenBarrierError):  # the client that broke it says why below
            barrier.wait(READY_S)
        before, begin = look(), time.monotonic()
        errors = [error for future in futures if (error := future.exception()) is not None]
        wall_s, after = time.monotonic() - begin, look()
    if errors:  # the others only heard of the first
        raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
    return Outcome([answer for future in futures for answer in future.result()], wall_s, before, after)


_barrier: Any = None


def _keep(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _client(load: Load, part: int) -> list[Answer]:
    """One process's work: every ``processes``-th window."""
    indices = range(part, load.windows, load.processes)
    concurrency = math.ceil(load.concurrency / load.processes)
    recordings: Samples = np.load(load.recordings, mmap_mode="r")
    try:
        if load.way == "handle":
            send = _through_handle(load, recordings, concurrency)
        else:
            send = _over_http(load, recordings, concurrency)
        warm_up = send(indices[:concurrency])
        failed = [answer.error for answer in warm_up if answer.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(warm_up)} windows failed at first: {failed[0]}")
    except BaseException:
        _barrier.abort()
        raise
    _barrier.wait(READY_S)
    return send(indices)


def _through_handle(load: Load, recordings: Samples, concurrency: int) -> Callable[[Sequence[int]], list[Answer]]:
    from serve_app.client import Client
    from serve_app.errors import ServiceError

    client = Client(load.app_name, address=load.address)

    def transcribe(index: int) -> Answer:
        audio = recordings[index % len(recordings)]
        try:
            transcript = client.transcribe(audio, language="en", priority="batch")
        except ServiceError as error:
            return Answer(error=error.message)
        return _answer((s.tokens, s.temperature) for s in transcript.segments)

    def send(indices: Sequence[int]) -> list[Answer]:
        # not transcribe_many, which gives answers in order: when each came is asked for
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(transcribe, indices))

    return send


def _over_http(load: Load, recordings: Samples, concurrency: int) -> Callable[[Sequence[int]], list[Answer]]:
    form = {"model": "whisper-1", "language": "en", "response_format": "verbose_json"}

    async def post(client: httpx.AsyncClient, turn: asyncio.Semaphore, index: int) -> Answer:
        async with turn:
            content = wav(recordings[index % len(recordings)])
            try:
                response = await client.post(traffic.ENDPOINT, data=form, files={"file": ("window.wav", content)})
            except httpx.TransportError as error:
                return Answer(error=f"{type(error).__name__}: {error}")
        if response.status_code != httpx.codes.OK:
            return Answer(error=f"status {response.status_code}: {response.text[:200]}")
        return _answer((s["tokens"], s["temperature"]) for s in response.json()["segments"])

    async def post_all(indices: Sequence[int]) -> list[Answer]:
        turn = asyncio.Semaphore(concurrency)
        async with traffic.client(load.address) as client:
            return await asyncio.gather(*(post(client, turn, index) for index in indices))

    return lambda indices: asyncio.run(post_all(indices))


def _answer(segments: Iterable[tuple[list[int], float]]) -> Answer:
    found = list(segments)
    return Answer(sum(len(tokens) for tokens, _ in found), max((t for _, t in found), default=0.0))


def wav(samples: Samples) -> bytes:
    """16-bit WAV, mono, 16 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()
