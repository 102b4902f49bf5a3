"""What the three stages share: a replica's queue, the events it streams to its callers, the loop that works it off."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from serve_app.batching.budget import AdaptiveBudget
from serve_app.batching.feedback import Bounds, FeedbackSettings
from serve_app.batching.messages import (
    Cancelled,
    Done,
    Event,
    Failed,
    InputLost,
    Refused,
    StageCall,
    StageWindow,
    Started,
)
from serve_app.batching.planner import Waiting, expired, plan
from serve_app.errors import DeadlineExceeded
from serve_app.scaling.readings import encode
from serve_app.scaling.signals import Outcome, StageMeter, measure_saturation
from serve_app.settings import StageSettings
from serve_app.stages.observed import QueueState, StageObserver
from serve_app.stages.ring import RingError, gpu_of
from serve_app.stages.transport import Descriptor, Incoming, Input, Receiver
from serve_app.stages.turns import GpuTurns

logger = logging.getLogger(__name__)

T = TypeVar("T")

NOTICE_S = 0.05
"""How long a window that runs alone waits between the notice to its caller and its start: should it end this process,
the caller knows that it was running."""

ENGINE_WAITS_S = 0.0001
"""How long the engine's thread, back from torch, waits for the interpreter where calls keep it busy, and it comes back
from every call to torch: with Python's own 5 ms the GPU has nothing to do for several steps of a small model."""


@dataclass(eq=False, slots=True)
class Entry:
    """A window that this replica holds, its input, on its way since it arrived, and where its events go."""

    window: StageWindow
    waiting: Waiting
    events: asyncio.Queue[Event]
    incoming: Incoming
    began: float = 0.0  # when it was taken from the queue

    @property
    def received(self) -> Input | InputLost:
        """Its input, which must be here."""
        return self.incoming.future.result(timeout=0)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Windows that a replica holds."""

    waiting: int
    running: int


class StageReplica(ABC):
    """Holds windows from when a call brings them until they are done; subclasses decide what runs when (``_work``), and
    end their construction with ``_follow_load`` and ``_begin_observing``."""

    stage: str
    """Its name in metrics."""

    fills_gpu = True
    """Does its work keep a GPU busy? Then it takes turns with the GPU's other stages."""

    budget: float
    """What a batch may cost now, in the unit of the windows' cost."""

    feedback: AdaptiveBudget
    """What moves the budget, and says how long to wait for a fuller batch; fed by the work loop alone."""

    def __init__(self, stage: StageSettings, device: torch.device):
        self._settings = stage
        self._gpu = gpu_of(device)
        self._receive = Receiver(device)
        self._queue: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
        self._changed = asyncio.Event()  # a window, or its input, has come, or one has gone
        self._worker: asyncio.Task[None] | None = None
        self.meter = StageMeter(on_gpu=device.type == "cuda")
        self._observer: StageObserver | None = None
        # for the engine's thread
        self.turns = GpuTurns(self._gpu) if self._gpu is not None and self.fills_gpu else None
        # One thread runs the engine, so that its work is ordered; the event loop stays free for calls.
        self._engine = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine")
        sys.setswitchinterval(ENGINE_WAITS_S)

    @abstractmethod
    async def _work(self) -> None:
        """Takes windows from the queue and runs them, for ever."""

    async def process(self, call: StageCall, *, replica: str | None = None) -> AsyncIterator[list[Event]]:
        """Takes a call's windows in and streams their events until each is done."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        events: asyncio.Queue[Event] = asyncio.Queue()
        room = max(0, self._settings.max_queued_windows - len(self._queue))
        accepted, refused = call.windows[:room], call.windows[room:]
        for window in accepted:
            entry = Entry(window, _waiting(window), events, self._receive(window.input))
            self._queue[window.window_id] = entry
            if not entry.incoming.is_at_hand:
                entry.incoming.future.add_done_callback(lambda _: self._changed.set())
        self._changed.set()
        unanswered = {window.window_id for window in accepted}
        try:
            if refused:
                yield [Refused([window.window_id for window in refused])]
            while unanswered:
                batch = [await events.get()]
                while not events.empty():
                    batch.append(events.get_nowait())
                unanswered -= {event.window_id for event in batch if isinstance(event, Done | Failed)}
                yield batch
        finally:
            # where some are left, the caller has gone or has cancelled the call
            await self.cancel(list(unanswered))

    async def cancel(self, window_ids: Sequence[str], *, replica: str | None = None) -> None:
        """Forgets these windows, whether they wait or run; unknown ones are ignored."""
        for window_id in window_ids:
            entry = self._queue.pop(window_id, None) or self._running.pop(window_id, None)
            if entry is not None:
                self.meter.ended("cancelled")
                entry.events.put_nowait(Failed(window_id, Cancelled()))
                self._changed.set()

    def _follow_load(self, settings: FeedbackSettings, bounds: Bounds) -> None:
        """Lets feedback move the budget from now on, from the most that it may be."""
        self.feedback = AdaptiveBudget(settings, bounds, start=bounds.most, now=time.time())
        self.budget = self.feedback.budget

    @property
    def budget_at_bound(self) -> bool:
        """Can batches not grow any more?"""
        return self.feedback.at_bound

    def _adjust(self) -> None:
        """Takes the budget that feedback gives, once a second."""
        now = time.time()
        if not self.feedback.is_due(now):
            return
        waiting = [entry.waiting for entry in self._queue.values()]
        self.feedback.observe(
            now,
            waiting=[w.cost for w in waiting],
            oldest=min((w.arrived for w in waiting), default=now),
            utilization=None if self._observer is None else self._observer.utilization,
        )
        self.budget = self.feedback.budget

    def _begin_observing(self, full_batch: Callable[[], float] | None = None) -> None:
        """Takes the replica's measure from now on. full_batch: runs one, to its end, and gives its seconds of audio; on
        a GPU it is run for the settings' ``warm_up_s`` first, to learn what the GPU looks like when it is saturated."""
        saturation, rate = 1.0, None
        if self._gpu is not None and full_batch is not None and self._settings.warm_up_s > 0:
            saturation, rate = measure_saturation(self._gpu, full_batch, self._settings.warm_up_s)
        self.meter = StageMeter(on_gpu=self._gpu is not None, rate=rate)
        self._observer = StageObserver(self, self._gpu, saturation)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it where the deployment is autoscaled (``scaling.readings.ReplicaReading``)."""
        return {} if self._observer is None else encode(self._observer.reading())

    def queue_state(self) -> QueueState:
        """May be asked by any thread."""
        entries = list(self._queue.values())
        arrived = min((entry.waiting.arrived for entry in entries), default=None)
        return QueueState(len(entries), sum(entry.window.seconds for entry in entries), arrived, len(self._running))

    async def gpu(self, *, replica: str | None = None) -> str | None:
        """UUID of the GPU that the replica computes on; None where it is the CPU."""
        return self._gpu

    async def occupancy(self, *, replica: str | None = None) -> Occupancy:
        return Occupancy(len(self._queue), len(self._running))

    def check_health(self) -> None:
        """Raises where the replica cannot go on; Serve then replaces it."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("the replica's work loop has ended") from self._worker.exception()

    async def _next(self) -> None:
        """Waits until a window waits."""
        while not self._queue:
            self._changed.clear()
            await self._changed.wait()

    def _expire(self) -> None:
        """Gives up windows that nobody waits for any more."""
        for late in expired((e.waiting for e in self._queue.values()), time.time()):
            entry = self._queue.pop(late.window_id)
            self.meter.ended("expired")
            error = DeadlineExceeded("the deadline passed while a window waited for a replica")
            entry.events.put_nowait(Failed(late.window_id, error))

    async def _take(self, planned: Sequence[Waiting]) -> list[Entry]:
        """Takes planned windows from the queue. Their inputs are here, but for those in rings; windows whose input is
        lost have failed."""
        entries = [self._queue.pop(w.window_id) for w in planned]
        for entry in entries:
            self._running[entry.window.window_id] = entry
            entry.began = time.time()
            self.meter.waited(entry.began - entry.waiting.arrived)
            if entry.window.alone:
                entry.events.put_nowait(Started(entry.window.window_id))
        if any(w.alone for w in planned):
            await asyncio.sleep(NOTICE_S)
        taken: list[Entry] = []
        for entry in entries:
            if not entry.incoming.in_ring:
                received = await asyncio.wrap_future(entry.incoming.future)
                if isinstance(received, InputLost):
                    self._fail(entry, received)
            if entry.window.window_id in self._running:  # not cancelled meanwhile
                taken.append(entry)
        return taken

    def _done(self, entry: Entry, result: Any, *, tokens: int = 0) -> None:
        """tokens: that were decoded for it."""
        if self._answer(entry, Done(entry.window.window_id, result)):
            self.meter.ended("done", audio_s=entry.window.seconds, tokens=tokens)

    def _fail(self, entry: Entry, error: Exception) -> None:
        outcome: Outcome = "input_lost" if isinstance(error, InputLost) else "failed"
        if self._answer(entry, Failed(entry.window.window_id, error)):
            self.meter.ended(outcome)

    def _answer(self, entry: Entry, event: Event) -> bool:
        """False where the window was cancelled meanwhile."""
        if self._running.pop(entry.window.window_id, None) is None:
            return False
        entry.events.put_nowait(event)
        return True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The GPU's other stages wait meanwhile. What is launched inside must also end inside."""
        if self.turns is None:
            yield
            return
        self.turns.take()
        try:
            yield
        finally:
            self.turns.give()

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs a piece of the engine on its thread. A CUDA error ends the process: the device's state is lost, and
        Serve starts a clean replica."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._engine, work, *arguments)
        except Exception as error:
            if not is_gpu_failure(error):
                raise
            logger.exception("the GPU failed; this replica ends")
            os._exit(1)


def is_gpu_failure(error: Exception) -> bool:
    """Does an error leave the GPU's state unknown to this process? PyTorch's own and cuda-python's; not that memory is
    short, which harms only the work that asked for it."""
    return isinstance(error, torch.AcceleratorError | RingError) or type(error).__name__ == "CUDAError"


def _waiting(window: StageWindow) -> Waiting:
    return Waiting(window.window_id, window.cost, time.time(), window.deadline, window.priority, window.alone)


class Export(Protocol):
    """``stages.transport.Exporter``."""

    def begin(self, tensors: Tensor, consumers: Sequence[Collection[str]]) -> list[Descriptor | None]: ...

    def finish(
        self, tensors: Tensor, consumers: Sequence[Collection[str]], begun: Sequence[Descriptor | None]
    ) -> list[Any]: ...


class BatchStage(StageReplica):
    """A stage that runs rectangular batches: while one runs, the next gathers in the queue."""

    operations: float = 0.0
    """Floating-point operations of one window (``engine.work``)."""

    export: Export
    """Makes results known to the next stage."""

    def bounds(self, settings: FeedbackSettings, *, least: float, most: float) -> Bounds:
        """Of the budget: from one window to what memory was planned for. A window sees the batch before its own end."""
        return Bounds(
            least=least,
            most=most,
            quantum=least,
            objective_s=settings.objective_s(self.stage, on_gpu=self._gpu is not None),
            batches=2,
            most_wait_s=settings.max_wait_s,
        )

    @abstractmethod
    def _batch(self, inputs: list[Input]) -> Tensor:
        """Runs one batch, on the engine's thread: [n, …]."""

    def _run_batch(self, taken: list[Entry]) -> list[Any]:
        """On the engine's thread: what each window's result is known by, or InputLost."""
        with self._turn():
            self._receive.read_rings()
            entries, inputs = [], []
            for entry in taken:
                received = entry.received
                if not isinstance(received, InputLost):
                    entries.append(entry)
                    inputs.append(received)
            if not entries:
                return [entry.received for entry in taken]
            consumers = [entry.window.consumers for entry in entries]
            at = time.time()
            with self.meter.running():
                results = self._batch(inputs)
                begun = self.export.begin(results, consumers)  # launched while the GPU still computes
            if results.is_cuda:
                done = torch.cuda.Event(blocking=True)  # who waits for it sleeps
                done.record()
                done.synchronize()
            seconds = time.time() - at
        costs = [entry.window.cost for entry in entries]
        self.meter.batch(len(entries), min(1.0, sum(costs) / self.budget), len(entries) * self.operations)
        arrived = [entry.waiting.arrived for entry in entries]
        self.feedback.batch(len(entries) * max(costs), arrived, began=at, seconds=seconds)
        exported = iter(self.export.finish(results, consumers, begun))
        return [entry.received if isinstance(entry.received, InputLost) else next(exported) for entry in taken]

    async def _gather(self) -> None:
        """Waits for a fuller batch as long as feedback says, unless a window is in haste."""
        while self._queue and self.feedback.wait_s:
            waiting = [entry.waiting for entry in self._queue.values()]
            if any(w.priority == "interactive" or w.alone for w in waiting):
                return
            oldest = min(w.arrived for w in waiting)
            left = self.feedback.leaves_at((w.cost for w in waiting), oldest) - time.time()
            if left <= 0:
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    async def _work(self) -> None:
        while True:
            await self._next()
            self._adjust()
            await self._gather()
            self._expire()
            taken = await self._take(plan((e.waiting for e in self._queue.values()), budget=self.budget))
            if not taken:
                continue
            try:
                results = await self._run(self._run_batch, taken)
            except Exception as error:
                logger.exception("a batch of %d windows failed", len(taken))
                for entry in taken:
                    self._fail(entry, error)
                continue
            for entry, result in zip(taken, results, strict=True):
                if isinstance(result, InputLost):
                    self._fail(entry, result)
                else:
                    self._done(entry, result)
