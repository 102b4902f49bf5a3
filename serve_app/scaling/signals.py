"""What one replica measures of its own work: how long it ran, how full its batches were, what the GPU did meanwhile.

The engine's thread and the event loop report to a ``StageMeter`` as things happen; once a second an ``Observer``'s
thread takes what came together. Nothing here waits for the GPU.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from serve_app.scaling.nvml import GpuReader

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""How often a replica takes its measure."""

RATE_MEMORY_S = 20.0
"""Seconds of running full batches after which what was measured before counts for a third."""

DONE_MEMORY_S = 3.0
"""Seconds after which what was finished before counts for a third: windows end in lumps."""

LEAST_SATURATION = 0.05
"""A GPU that seems less used than this by full batches was not really measured."""

TURN_S = 30.0
"""How long a stage waits for its turn to measure the GPU alone."""

Outcome = Literal["done", "failed", "cancelled", "expired", "input_lost"]


class GpuClock:
    """How long a thread's work held the GPU, by pairs of CUDA events that are read once the GPU has come past them.

    ``begin`` and ``end`` are for the thread that launches; ``take`` may be called by another one.
    """

    def __init__(self) -> None:
        self._unused: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def span(self) -> Iterator[None]:
        """What is launched inside, on the current stream, counts."""
        try:
            pair = self._unused.popleft()
        except IndexError:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        try:
            yield
        finally:
            pair[1].record()
            self._open.append(pair)

    def take(self) -> float:
        """Seconds of the spans that have ended since the last call."""
        seconds = 0.0
        while self._open and self._open[0][1].query():
            pair = self._open.popleft()
            seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._unused.append(pair)
        return seconds


class Arrivals:
    """Seconds of audio that came in the last second. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._now = clock
        self._came: deque[tuple[float, float]] = deque()

    def add(self, seconds: float) -> None:
        self._came.append((self._now(), seconds))
        self._forget()

    def last_second(self) -> float:
        self._forget()
        return sum(seconds for _, seconds in self._came)

    def _forget(self) -> None:
        while self._came and self._came[0][0] <= self._now() - 1.0:
            self._came.popleft()


@dataclass(frozen=True, slots=True)
class Period:
    """What a stage did in the time since the last one was taken.

    seconds: its length. busy, gpu_share, fill, rate, done_s: as in ``readings.ReplicaReading``. batches: how many of
    each size, in windows; a step of the decoder is one. operations: floating-point operations of these. audio_s,
    tokens: what was finished. outcomes: windows by how they ended. waits: seconds that each window taken from the queue
    had waited.
    """

    seconds: float
    busy: float = 0.0
    gpu_share: float | None = None
    fill: float = 0.0
    rate: float | None = None
    done_s: float = 0.0
    batches: Counter[int] = field(default_factory=Counter)
    operations: float = 0.0
    audio_s: float = 0.0
    tokens: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)


class StageMeter:
    """Adds up a replica's work until it is taken. For several threads; ``running`` for the engine's alone.

    on_gpu: does the work run on a GPU? rate: seconds of audio a busy second, where it has been measured already.
    """

    def __init__(self, *, on_gpu: bool, rate: float | None = None, clock: Callable[[], float] = time.monotonic):
        self._now = clock
        self._lock = threading.Lock()
        self._gpu = GpuClock() if on_gpu else None
        self._gpu_left = 0.0  # of work that was longer than the period in which it ended
        self._since = clock()
        self._began: float | None = None
        self._busy = 0.0
        self._fills = 0.0
        self._batches: Counter[int] = Counter()
        self._operations = 0.0
        self._audio = 0.0
        self._tokens = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._waits: list[float] = []
        self._rate = Rate(rate)
        self._done = 0.0  # seconds of audio a second

    @contextmanager
    def running(self) -> Iterator[None]:
        """A piece of the engine runs inside."""
        with self._lock:
            self._began = self._now()
        try:
            if self._gpu is None:
                yield
            else:
                with self._gpu.span():
                    yield
        finally:
            with self._lock:
                assert self._began is not None
                self._busy += self._now() - self._began
                self._began = None

    def batch(self, windows: int, fill: float, operations: float = 0.0) -> None:
        """A batch, or a step, of so many windows ran, which used this share of its budget."""
        with self._lock:
            self._batches[windows] += 1
            self._fills += fill
            self._operations += operations

    def waited(self, seconds: float) -> None:
        """A window was taken from the queue after so long."""
        with self._lock:
            self._waits.append(seconds)

    def ended(self, outcome: Outcome, *, audio_s: float = 0.0, tokens: int = 0) -> None:
        """A window ended; audio_s and tokens: what was done of it."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._audio += audio_s
            self._tokens += tokens

    def take(self) -> Period:
        """The period since the last call."""
        gpu_s = None if self._gpu is None else self._gpu.take()
        with self._lock:
            now = self._now()
            seconds = max(now - self._since, 1e-6)
            busy = self._busy
            if self._began is not None:  # what still runs counts up to now
                busy, self._began = busy + now - self._began, now
            share = None
            if gpu_s is not None:
                held = gpu_s + self._gpu_left
                share = min(1.0, held / seconds)
                self._gpu_left = held - share * seconds
            # the host prepares the next batch while the GPU works at the last: neither alone is all of it
            busy_share = max(min(1.0, busy / seconds), share or 0.0)
            number = self._batches.total()
            fill = self._fills / number if number else 0.0
            rate = self._rate.update(self._audio, busy_share * seconds, fill)
            self._done += (1 - math.exp(-seconds / DONE_MEMORY_S)) * (self._audio / seconds - self._done)
            period = Period(
                seconds, busy_share, share, fill, rate, self._done,
                self._batches, self._operations, self._audio, self._tokens, self._outcomes, self._waits,
            )  # fmt: skip
            self._since, self._busy, self._fills, self._operations = now, 0.0, 0.0, 0.0
            self._audio, self._tokens = 0.0, 0
            self._batches, self._outcomes, self._waits = Counter(), Counter(), []
        return period


class Rate:
    """Seconds of audio a busy second, smoothed over busy time. Full batches count for more: the rate is to say what a
    replica can do under load, and a batch of one says little of that."""

    def __init__(self, first: float | None = None):
        self._audio, self._busy = (0.0, 0.0) if first is None else (first, 1.0)

    def update(self, audio_s: float, busy_s: float, fill: float) -> float | None:
        """The rate with one more period in it; None where nothing has been done yet."""
        kept = math.exp(-busy_s * fill / RATE_MEMORY_S)
        # windows that end in a period without a batch of its own count like a nearly empty one
        weight = max(fill, 0.01)
        self._audio = self._audio * kept + weight * audio_s
        self._busy = self._busy * kept + weight * busy_s
        return self._audio / self._busy if self._audio > 0 and self._busy > 0 else None


class Observer:
    """Calls ``observe`` once a period, on a thread of its own, until it is stopped. An error is logged, once for each
    message: observing never ends what is observed."""

    def __init__(self, observe: Callable[[], None], period_s: float = PERIOD_S):
        self._observe, self._period = observe, period_s
        self._stopped = threading.Event()
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                self._observe()
            except Exception as error:
                if str(error) not in self._told:
                    self._told.add(str(error))
                    logger.exception("this replica could not take its measure")


def measure_saturation(uuid: str, run: Callable[[], float], seconds: float) -> tuple[float, float | None]:
    """The SM utilization of a GPU while full batches alone run on it, and how many seconds of audio a second they do.

    run: does one full batch, to its end, and gives its seconds of audio. Stages that start on one GPU take turns.
    Where the utilization cannot be read it is taken to be 1, so that nothing is ever normalised upwards by a guess.
    """
    with alone_on(uuid):
        run()  # the first one compiles, allocates and grows caches
        reader = GpuReader(uuid)
        try:
            begin, audio = time.monotonic(), 0.0
            while time.monotonic() - begin < seconds:
                audio += run()
            elapsed = time.monotonic() - begin
            measured = reader.read().sm_utilization
        finally:
            reader.close()
    if measured is None or measured < LEAST_SATURATION:
        logger.warning("GPU %s: the SM utilization of full batches was not measured (%s); 1 is taken", uuid, measured)
        measured = 1.0
    return min(1.0, measured), (audio / elapsed if audio > 0 else None)


@contextmanager
def alone_on(uuid: str) -> Iterator[None]:
    """One process of this user at a time measures on a GPU; after a while it does so beside another."""
    path = Path(tempfile.gettempdir()) / f"whisper-serve-{os.getuid()}-{uuid}.lock"
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    give_up = time.monotonic() + TURN_S
    try:
        while time.monotonic() < give_up:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
    finally:
        os.close(lock)
