"""The decoder stage: encoder state → tokens, batched in flight. Its unit is slots."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from serve_app.batching.feedback import Bounds
from serve_app.batching.messages import InputLost
from serve_app.batching.planner import plan
from serve_app.engine import memory, work
from serve_app.engine.checkpoint import Dims, load
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens
from serve_app.settings import Settings, known
from serve_app.stages.replica import Entry, StageReplica, logger
from serve_app.stages.threads import use_threads
from serve_app.stages.transport import received_tensor
from serve_app.stages.turns import gives_way

WARM_UP_STEPS = 64

STINT_S = 0.005
"""So long the engine steps before it looks for windows that come, and those that nobody waits for any more."""

TOLD_S = 0.25
"""After so long it tells of its steps, also where no window has ended."""

LOOKS_S = 1.0
"""How often windows that wait are looked at where nothing happens."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What callers need to know of the model that is served, and of a decoder replica's slots."""

    name: str
    dims: Dims
    slots: int


@dataclass(slots=True)
class _Progress:
    """Of the engine since a moment (time.monotonic). busy_s: in steps; cost_s: each of these seconds by the occupied
    slots."""

    since: float
    busy_s: float = 0.0
    cost_s: float = 0.0
    finished: list[tuple[str, DecodedWindow]] = field(default_factory=list)


class DecoderStage(StageReplica):
    """Replica of the decoder stage: a finished window's slot is taken by the next one between two steps."""

    stage = "decoder"

    def __init__(self, settings: Settings):
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        super().__init__(settings.decoder, compute.device)
        use_threads(settings.decoder.threads)
        self._decoder_settings = settings.decoder
        checkpoint = load(settings.model.source)
        slots = self._plan_slots(checkpoint.dims, compute)
        self._info = ModelInfo(checkpoint.name, checkpoint.dims, slots)
        rules = rules_of(Tokens(checkpoint.dims).vocabulary, checkpoint.dims, settings.decoder.max_tokens)
        self._slots = SlotDecoder(checkpoint, compute, slots, rules, state_bits=settings.decoder.state_bits)
        self._entering: deque[Entry] = deque()  # on their way from the event loop to the engine's thread
        objective_s = settings.feedback.objective_s(self.stage, on_gpu=self._gpu is not None)
        self._follow_load(settings.feedback, Bounds(least=1, most=slots, quantum=1, objective_s=objective_s, batches=1))
        self._operations = work.step_operations(checkpoint.dims)
        self._begin_observing(self._full_steps)

    def _plan_slots(self, dims: Dims, compute: Compute) -> int:
        stage = self._decoder_settings
        if compute.device.type == "cpu":
            return known(stage.slots)
        share = memory.share_of(compute.device, known(stage.num_gpus), stage.memory_gib)
        number = compute.dtype.itemsize
        queued = stage.max_queued_windows
        slots = memory.plan_slots(dims, number, share, queued, stage.slots, state_bits=stage.state_bits)
        each = memory.slot_bytes(dims, number, stage.state_bits)
        need = memory.decoder_bytes(dims, number, queued) + slots * each
        memory.take_share(compute.device, share, need, what="the decoder")
        return slots

    async def describe(self, *, replica: str | None = None) -> ModelInfo:
        return self._info

    async def _work(self) -> None:
        """Windows go to the engine as slots come free; it runs by itself as long as it has some, since it would wait
        long for an event loop that is busy with calls, and the GPU with it."""
        decoding: asyncio.Task[None] | None = None
        while True:
            self._changed.clear()
            await self._admit()
            self._adjust()
            if decoding is not None and decoding.done():
                if (error := decoding.exception()) is not None:
                    logger.error("decoding failed with %d windows under way", len(self._running), exc_info=error)
                    self._entering.clear()  # what is in the slots already leaves them when it goes on
                    for entry in list(self._running.values()):
                        self._fail(entry, error if isinstance(error, Exception) else RuntimeError(str(error)))
                decoding = None
            if decoding is None and self._entering:
                decoding = asyncio.create_task(self._run(self._decode, asyncio.get_running_loop()))
                decoding.add_done_callback(lambda _: self._changed.set())
            waits = LOOKS_S if self._queue or decoding is not None else None
            with suppress(TimeoutError):
                async with asyncio.timeout(waits):
                    await self._changed.wait()

    def _decode(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the engine's thread: steps until no window is left."""
        done = _Progress(time.monotonic())
        try:
            while self._entering or self._slots.active:
                if self.turns is not None and not self.turns.held:
                    self.turns.take()
                    self._stint(done, 0.0)  # so that the GPU computes while windows enter
                self._enter(loop)
                self._stint(done, STINT_S)
                if self._gives_way() or not self._slots.active:
                    done.finished += self._leave_gpu()
                now = time.monotonic()
                if done.finished or now - done.since > TOLD_S:
                    loop.call_soon_threadsafe(self._tell, done, now - done.since)
                    done = _Progress(now)
        finally:
            if self.turns is not None and self.turns.held:  # after an error
                self.turns.give()

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Frees the slots of windows that nobody waits for any more, and fills free ones."""
        self._slots.cancel({name for name in self._slots.window_ids if name not in self._running})
        entries: list[Entry] = []
        while self._entering and len(entries) < self._slots.free:
            entry = self._entering.popleft()
            if entry.window.window_id in self._running:
                entries.append(entry)
        self._receive.read_rings()  # now: what comes after the entries were taken is not theirs
        tasks: list[SlotTask] = []
        for entry in entries:
            if isinstance(received := entry.received, InputLost):
                loop.call_soon_threadsafe(self._fail, entry, received)
                continue
            assert entry.window.options is not None
            tasks.append(SlotTask(entry.window.window_id, received_tensor(received), entry.window.options))
        if tasks:
            with self.meter.running():
                self._slots.admit(tasks)

    def _stint(self, done: _Progress, seconds: float) -> None:
        """Steps of the occupied slots for so long, at least one launch."""
        if not self._slots.active:
            return
        ends = time.monotonic() + seconds
        with self.meter.running():
            while active := self._slots.active:
                began, before = time.monotonic(), self._slots.started
                done.finished += self._slots.step(coming=len(self._entering))
                now = time.monotonic()
                done.cost_s += active * (now - began)
                done.busy_s += now - began
                for _ in range(self._slots.started - before):
                    self.meter.batch(active, active / self._info.slots, active * self._operations)
                if now > ends or self._gives_way():
                    break

    def _tell(self, done: _Progress, seconds: float) -> None:
        """On the event loop: what the engine has done in so many seconds, in which others had their turns too."""
        if done.busy_s:
            self.feedback.ran(done.cost_s / done.busy_s, seconds)
        now = time.time()
        for window_id, result in done.finished:
            if window_id in self._running:
                entry = self._running[window_id]
                self.feedback.ended(arrived=entry.waiting.arrived, began=entry.began, at=now)
                self._done(entry, result, tokens=len(result.tokens))
        self._changed.set()

    def _gives_way(self) -> bool:
        turns = self.turns
        if turns is None or not turns.wanted:
            return False
        waiting, slots = len(self._queue) + len(self._entering), self._info.slots
        free = min(self._slots.free, int(self.budget) - self._slots.active)
        return gives_way(held_s=turns.held_s, free=free, waiting=waiting, slots=slots)

    def _leave_gpu(self) -> list[tuple[str, DecodedWindow]]:
        """Ends the turn on the GPU, if there is one; what was on its way may finish windows."""
        if self.turns is None or not self.turns.held:
            return []
        self._slots.wait()
        self.turns.give()
        return self._slots.read()

    def _full_steps(self) -> float:
        """Some steps of all slots. Of silence they tell nothing about how long a window takes."""
        dims, compute = self._info.dims, self._slots.decoder.compute
        state = torch.zeros((dims.n_audio_ctx, dims.n_audio_state), device=compute.device, dtype=compute.dtype)
        options = DecodeOptions(language="en", timestamps=False)
        self._slots.admit([SlotTask(str(i), state, options) for i in range(self._slots.free)])
        for _ in range(WARM_UP_STEPS // self._slots.steps):
            self._slots.step()
        self._slots.cancel(self._slots.window_ids)
        self._slots.read()
        return 0.0

    async def _admit(self) -> None:
        """Gives the engine windows whose input is at hand, as many as there are slots: those in the slots do not wait
        for a fetch. A window that must run alone waits until no other is under way, and keeps the slots to itself."""
        self._expire()
        room = int(self.budget) - len(self._running)
        if room <= 0 or any(entry.window.alone for entry in self._running.values()):
            return
        at_hand = (entry.waiting for entry in self._queue.values() if entry.incoming.is_at_hand)
        planned = plan(at_hand, budget=room, padded=False)
        if planned and not (planned[0].alone and self._running):
            self._entering.extend(await self._take(planned))
