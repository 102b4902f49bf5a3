"""The decoder stage: encoder state → tokens, batched in flight. Its unit is slots."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import torch

from serve_app.batching.feedback import Bounds
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
from serve_app.stages.transport import Input, received_tensor
from serve_app.stages.turns import gives_way

WARM_UP_STEPS = 64

STINT_S = 0.005
"""So long the engine steps by itself: windows that have ended, and those that come, wait for it. Handing each step over
between its thread and the event loop takes a small model's GPU longer than the step."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What callers need to know of the model that is served, and of a decoder replica's slots."""

    name: str
    dims: Dims
    slots: int


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
        self._slots = SlotDecoder(checkpoint, compute, slots, rules)
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
        slots = memory.plan_slots(dims, number, share, queued, stage.slots)
        need = memory.decoder_bytes(dims, number, queued) + slots * memory.slot_bytes(dims, number)
        memory.take_share(compute.device, share, need, what="the decoder")
        return slots

    async def describe(self, *, replica: str | None = None) -> ModelInfo:
        return self._info

    async def _work(self) -> None:
        while True:
            if not self._slots.active:
                await self._run(self._leave_gpu)
                await self._next_input()
            began = time.time()
            try:
                await self._admit()
                active = self._slots.active
                finished, steps = await self._run(self._stint)
            except Exception as error:
                logger.exception("decoding failed with %d windows in their slots", self._slots.active)
                for entry in list(self._running.values()):
                    self._fail(entry, error)
                continue  # the next step frees their slots
            now = time.time()
            self.feedback.ran(active, (now - began) / max(1, steps))
            for window_id, result in finished:
                if window_id in self._running:
                    entry = self._running[window_id]
                    self.feedback.ended(arrived=entry.waiting.arrived, began=entry.began, at=now)
                    self._done(entry, result, tokens=len(result.tokens))
            self._adjust()

    def _stint(self) -> tuple[list[tuple[str, DecodedWindow]], int]:
        """Frees the slots of windows that nobody waits for any more, and advances the others, for a while: what has
        ended, and the number of steps."""
        self._slots.cancel(self._slots.window_ids - self._running.keys())
        if not self._slots.active:
            return self._slots.step(), 0
        if self._turns is not None:
            self._turns.take()
        finished: list[tuple[str, DecodedWindow]] = []
        steps, ends = 0, time.monotonic() + STINT_S
        with self.meter.running():
            while (active := self._slots.active) and time.monotonic() < ends:
                finished += self._slots.step()
                self.meter.batch(active, active / self._info.slots, active * self._operations)
                steps += 1
                if self._gives_way():
                    break
        if self._gives_way():
            finished += self._leave_gpu()
        return finished, steps

    def _gives_way(self) -> bool:
        turns = self._turns
        if turns is None or not turns.wanted:
            return False
        waiting, slots = len(self._queue), self._info.slots
        return gives_way(held_s=turns.held_s, free=self._room, waiting=waiting, slots=slots)

    def _leave_gpu(self) -> list[tuple[str, DecodedWindow]]:
        """Ends the turn on the GPU, if there is one; what was on its way may finish windows."""
        if self._turns is None or not self._turns.held:
            return []
        finished = self._slots.settle()
        self._turns.give()
        return finished

    def _full_steps(self) -> float:
        """Some steps of all slots. Of silence they tell nothing about how long a window takes."""
        dims, compute = self._info.dims, self._slots.decoder.compute
        state = torch.zeros((dims.n_audio_ctx, dims.n_audio_state), device=compute.device, dtype=compute.dtype)
        options = DecodeOptions(language="en", timestamps=False)
        self._slots.admit([SlotTask(str(i), state, options) for i in range(self._slots.free)])
        for _ in range(WARM_UP_STEPS):
            self._slots.step()
        self._slots.cancel(self._slots.window_ids)
        self._slots.step()  # reads what is left of the last one
        return 0.0

    async def _next_input(self) -> None:
        """Waits until the input of a waiting window is here."""
        await self._next()
        fetches = {entry.fetch for entry in self._queue.values()}
        await asyncio.wait(fetches, return_when=asyncio.FIRST_COMPLETED)

    @property
    def _room(self) -> int:
        """Slots that may be filled."""
        return min(self._slots.free, int(self.budget) - self._slots.active)

    async def _admit(self) -> None:
        """Fills free slots from the queue, with windows whose input is here: those in the slots do not wait for a copy.
        A window that must run alone waits until all slots are free, and keeps them to itself."""
        self._expire()
        room = self._room
        if room <= 0 or any(entry.window.alone for entry in self._running.values()):
            return
        here = (entry.waiting for entry in self._queue.values() if entry.fetch.done())
        planned = plan(here, budget=room, padded=False)
        if not planned or (planned[0].alone and self._slots.active):
            return
        taken = await self._take(planned)
        await self._run(self._enter, [_task(entry, state) for entry, state in taken])

    def _enter(self, tasks: list[SlotTask]) -> None:
        if self._turns is not None:
            self._turns.take()
        with self.meter.running():
            self._slots.admit(tasks)


def _task(entry: Entry, state: Input) -> SlotTask:
    assert entry.window.options is not None
    return SlotTask(entry.window.window_id, received_tensor(state), entry.window.options)
