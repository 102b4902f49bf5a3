"""The adaptive batching handle: a caller's side of a stage.

Windows are sent against credits: each replica takes one batch to run and one to wait. While credit lasts a window
leaves at once; while the stage is busy windows gather here, and leave together, most urgent first, when some credit has
returned. The order *within* a replica is decided there, once (``batching.planner``).

Transcription is pure, so a call whose replica dies, or that breaks off in any other way, is sent again. Each of its
windows might be the reason: it runs alone from then on, and if it is running at a second death it ends in an error
instead of walking through all replicas.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import ray.exceptions
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app import metrics
from serve_app.batching.live import LIVE_REPLICAS, deployment_key
from serve_app.batching.messages import Done, Event, Failed, InputLost, Refused, StageCall, StageWindow, Started
from serve_app.batching.planner import PATIENCE_S
from serve_app.errors import DeadlineExceeded, TranscriptionFailed

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
MAX_DEATHS = 2
"""A window that was running on this many replicas as they died is taken to be the reason."""

ATTEMPT = "~"
"""Between a window's name and how often it was tried before."""

GATHERED = 8
"""A replica whose credit was used up gets windows again, but for interactive ones, when credit for so many has
returned, or a quarter of it. It still has work meanwhile, and a call costs each side some milliseconds of CPU, however
many windows are in it; of many callers each has but one or two windows in a batch."""

REFUSED_PAUSE_S = 0.2
"""How long a replica that refused windows, or broke off a call, is left alone."""
DEAD_PAUSE_S = 5.0
"""How long nothing is sent to a replica that has died: by then the router has heard of it."""


@dataclass(eq=False, slots=True)
class _Pending:
    window: StageWindow
    result: asyncio.Future[Any]
    arrived: float
    due: float
    attempts: int = 0
    deaths: int = 0
    running: bool = False
    call: StageCall | None = None  # that it is part of


@dataclass(frozen=True, slots=True)
class CreditQueue:
    """Windows that wait at a caller until a replica can take them, the seconds of audio in them, and how long the first
    has waited."""

    windows: int
    seconds: float
    oldest_wait_s: float


@dataclass(slots=True)
class _Replica:
    """What this caller has sent to a replica and not had back."""

    holds: dict[str, _Pending] = field(default_factory=dict)
    full: bool = False  # it had no credit left, and too little has returned since
    closed_until: float = 0.0
    asked: bool = False
    gpu: str | None = None


class BatchingHandle:
    """Calls a stage window by window; see the module's docstring. Belongs to one event loop.

    credit: windows that may be under way at one replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, credit: int):
        self._process = handle.options(method_name="process", stream=True)
        self._cancel = handle.options(method_name="cancel")
        self._gpu = handle.options(method_name="gpu")
        self._key = deployment_key(handle.app_name, handle.deployment_name)
        self._stage = handle.deployment_name
        self._credit = credit
        self._waiting: list[_Pending] = []
        self._replicas: defaultdict[str, _Replica] = defaultdict(_Replica)
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_cancel: defaultdict[str, list[str]] = defaultdict(list)
        self._loop = asyncio.get_running_loop()
        LIVE_REPLICAS.listen(self._key, self._on_replicas_changed)
        # the handles above share one router, with each other and with whoever has called the stage before: it may have
        # heard of the replicas already
        self._loop.call_soon(self._replicas_changed)

    @property
    def ready(self) -> bool:
        """Is a replica of the stage up?"""
        return bool(LIVE_REPLICAS.of(self._key))

    def waiting(self) -> CreditQueue:
        """What waits here for credit."""
        arrived = min((pending.arrived for pending in self._waiting), default=None)
        oldest = 0.0 if arrived is None else max(0.0, time.time() - arrived)
        return CreditQueue(len(self._waiting), sum(pending.window.seconds for pending in self._waiting), oldest)

    @property
    def gpus(self) -> frozenset[str]:
        """GPUs on which the stage has replicas, as far as they have told."""
        live = LIVE_REPLICAS.of(self._key)
        return frozenset(r.gpu for replica_id, r in self._replicas.items() if r.gpu is not None and replica_id in live)

    async def call(self, window: StageWindow) -> Any:
        """Runs the window on the stage and returns its result.

        Raises DeadlineExceeded when its deadline passes first, TranscriptionFailed when it cannot be done, and whatever
        error the stage gave for it. Cancelling the call frees the window's place wherever it is.
        """
        now = time.time()
        due = min(window.deadline, now + PATIENCE_S[window.priority])
        pending = _Pending(window, self._loop.create_future(), arrived=now, due=due)
        self._waiting.append(pending)
        self._dispatch()
        try:
            async with asyncio.timeout(window.deadline - time.time()):
                result = await pending.result
            metrics.STAGE_LATENCY.observe(time.time() - now, stage=self._stage)
            return result
        except TimeoutError:
            metrics.STAGE_ERRORS.add(stage=self._stage, reason="deadline")
            raise DeadlineExceeded(f"the deadline passed while a window was in the {self._stage} stage") from None
        finally:
            self._forget(pending)

    def _forget(self, pending: _Pending) -> None:
        """Takes a window out, from here or from the replica that holds it, if it is not done."""
        if pending in self._waiting:
            self._waiting.remove(pending)
            return
        window_id = pending.window.window_id
        for replica_id, replica in self._replicas.items():
            if replica.holds.get(window_id) is pending:
                del replica.holds[window_id]
                if not self._to_cancel:
                    self._loop.call_soon(self._send_cancels)
                self._to_cancel[replica_id].append(window_id)
                return

    def _send_cancels(self) -> None:
        cancels, self._to_cancel = self._to_cancel, defaultdict(list)
        for replica_id, window_ids in cancels.items():
            self._spawn(self._send_cancel(replica_id, window_ids))
        self._dispatch()

    async def _send_cancel(self, replica_id: str, window_ids: list[str]) -> None:
        try:
            await self._cancel.remote(window_ids, replica=replica_id)
        except Exception:
            # its work is gone with the replica
            logger.info("could not cancel windows on %s replica %s", self._stage, replica_id, exc_info=True)

    def _on_replicas_changed(self) -> None:
        """On the event loop of Serve's router, which may be another thread's."""
        if not self._loop.is_closed():  # the router outlives the loop of a handle that was made for a while
            self._loop.call_soon_threadsafe(self._replicas_changed)

    def _replicas_changed(self) -> None:
        live = LIVE_REPLICAS.of(self._key)
        for gone in [r for r, replica in self._replicas.items() if r not in live and not replica.holds]:
            del self._replicas[gone]
        for replica_id in live:
            replica = self._replicas[replica_id]
            if not replica.asked:
                replica.asked = True
                self._spawn(self._ask_gpu(replica_id, replica))
        self._dispatch()

    async def _ask_gpu(self, replica_id: str, replica: _Replica) -> None:
        try:
            replica.gpu = await self._gpu.remote(replica=replica_id)
        except Exception:
            # one that lives is asked again, for what it makes or takes would go through the object store for ever
            logger.info("%s replica %s did not tell its GPU", self._stage, replica_id, exc_info=True)
            replica.asked = False
            self._loop.call_later(DEAD_PAUSE_S, self._replicas_changed)

    def _dispatch(self) -> None:
        """Sends waiting windows, most urgent first, each to the replica with the most credit that can take it."""
        batches: defaultdict[str, list[_Pending]] = defaultdict(list)
        left: list[_Pending] = []
        for pending in sorted(self._waiting, key=lambda p: p.due):
            gpu = pending.window.gpu
            if gpu is not None and gpu not in self.gpus:
                if not pending.result.done():
                    lost = f"no replica of the {self._stage} stage is left on the GPU"
                    pending.result.set_exception(InputLost(lost))
                continue
            replica_id = self._most_credit(pending.window)
            if replica_id is None:
                left.append(pending)
                continue
            pending.attempts += 1
            pending.running = False
            self._replicas[replica_id].holds[pending.window.window_id] = pending
            if pending.window.alone:
                self._spawn(self._run(replica_id, [pending]))
            else:
                batches[replica_id].append(pending)
        self._waiting = left
        for replica_id, batch in batches.items():
            self._spawn(self._run(replica_id, batch))

    def _most_credit(self, window: StageWindow) -> str | None:
        """The replica, on the window's GPU if that matters, with the most credit, if one shall have windows now."""
        now, gpu = time.time(), window.gpu
        live = LIVE_REPLICAS.of(self._key)
        usable = [r for r in live if self._replicas[r].closed_until <= now and gpu in (None, self._replicas[r].gpu)]
        urgent = window.priority == "interactive"
        return min(
            (r for r in usable if self._takes(self._replicas[r], urgent=urgent)),
            key=lambda r: len(self._replicas[r].holds),
            default=None,
        )

    def _takes(self, replica: _Replica, *, urgent: bool) -> bool:
        left = self._credit - len(replica.holds)
        if left <= 0:
            replica.full = True
        elif left >= min(GATHERED, self._credit // 4):
            replica.full = False
        return left > 0 and (urgent or not replica.full)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # NOTES: an empty context. Serve ties calls to the request in whose context they are made and cancels them with
        # it; a stage call carries the windows of several requests.
        task = self._loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, replica_id: str, batch: list[_Pending]) -> None:
        """One stage call, from sending to its last event."""
        call = StageCall([p.window for p in batch])
        for pending in batch:
            pending.call = call
        pause_s = REFUSED_PAUSE_S
        cause: Exception | None = None
        try:
            stream = self._process.remote(call, replica=replica_id)
            assert isinstance(stream, DeploymentResponseGenerator)
            async for events in stream:
                for event in events:
                    self._take(replica_id, event)
                self._dispatch()
        except ray.exceptions.RayActorError as died:
            pause_s, cause = DEAD_PAUSE_S, died
        except Exception as other:  # a window's own error comes as an event; whatever else ends a call is the call's
            cause = other
        again = self._unanswered(replica_id, [p for p in batch if p.call is call])  # not those that were refused
        if again or cause is not None:
            self._retry(replica_id, again, cause, pause_s)
        self._dispatch()

    def _unanswered(self, replica_id: str, batch: list[_Pending]) -> list[_Pending]:
        """Windows of a call that are still held by its replica; their places are given back."""
        holds = self._replicas[replica_id].holds
        left = [p for p in batch if holds.get(p.window.window_id) is p]
        for pending in left:
            del holds[pending.window.window_id]
        return [p for p in left if not p.result.done()]

    def _take(self, replica_id: str, event: Event) -> None:
        replica = self._replicas[replica_id]
        match event:
            case Started(window_id):
                if window_id in replica.holds:
                    replica.holds[window_id].running = True
            case Done(window_id, result):
                pending = replica.holds.pop(window_id, None)
                if pending is not None and not pending.result.done():
                    pending.result.set_result(result)
            case Failed(window_id, error):
                pending = replica.holds.pop(window_id, None)
                if pending is not None and not pending.result.done():
                    if not isinstance(error, InputLost):
                        reason = "deadline" if isinstance(error, DeadlineExceeded) else "failed"
                        metrics.STAGE_ERRORS.add(stage=self._stage, reason=reason)
                    pending.result.set_exception(error)
            case Refused(window_ids):
                replica.closed_until = time.time() + REFUSED_PAUSE_S
                self._loop.call_later(REFUSED_PAUSE_S, self._dispatch)
                for window_id in window_ids:
                    pending = replica.holds.pop(window_id, None)
                    if pending is not None and not pending.result.done():
                        metrics.STAGE_RETRIES.add(stage=self._stage, reason="refused")
                        pending.attempts -= 1  # it was not tried
                        pending.call = None
                        self._waiting.append(pending)

    def _retry(self, replica_id: str, again: list[_Pending], cause: Exception | None, pause_s: float) -> None:
        """Windows of a call that has ended without their results. cause: None where it just ended."""
        logger.warning(
            "%s replica %s left %d windows undone: %s", self._stage, replica_id, len(again), cause or "its call ended"
        )
        self._replicas[replica_id].closed_until = time.time() + pause_s
        self._loop.call_later(pause_s, self._dispatch)
        for pending in again:
            # Of windows that ran together each may be the reason; of one that runs alone the notice that it has started
            # always comes (``stages.replica.NOTICE_S``).
            if pending.running or not pending.window.alone:
                pending.deaths += 1
                pending.window = replace(pending.window, alone=True)
            # a replica that lives may still hold it, and answer or cancel it late: that must not meet the next attempt
            name = pending.window.window_id.partition(ATTEMPT)[0]
            pending.window = replace(pending.window, window_id=f"{name}{ATTEMPT}{pending.attempts}")
            if pending.deaths >= MAX_DEATHS or pending.attempts >= MAX_ATTEMPTS:
                logger.error(
                    "window %s given up: %d attempts at the %s stage, running during %d deaths",
                    pending.window.window_id, pending.attempts, self._stage, pending.deaths,
                )  # fmt: skip
                metrics.STAGE_ERRORS.add(stage=self._stage, reason="gave_up")
                pending.result.set_exception(_failure(self._stage, cause))
            else:
                reason = "replica_died" if isinstance(cause, ray.exceptions.RayActorError) else "call_broke"
                metrics.STAGE_RETRIES.add(stage=self._stage, reason=reason)
                self._waiting.append(pending)


def _failure(stage: str, cause: Exception | None) -> TranscriptionFailed:
    error = TranscriptionFailed(f"part of the recording could not be transcribed (in the {stage} stage)")
    error.__cause__ = cause
    return error
