"""A stage for tests of the batching handle: real replicas, whose work is to sleep, fail or die as a window asks."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import torch

from serve_app.batching.feedback import FeedbackSettings
from serve_app.batching.messages import Event, StageCall
from serve_app.settings import StageSettings
from serve_app.stages.replica import BatchStage
from serve_app.stages.transport import Descriptor, Input

ENDS, RAISES, HOLDS = -1.0, -2.0, -3.0


class Returned:
    """Results travel in the answers themselves, as tuples of numbers."""

    def begin(self, tensors: torch.Tensor, consumers: Sequence[Collection[str]]) -> list[Descriptor | None]:
        return [None] * len(tensors)

    def finish(
        self, tensors: torch.Tensor, consumers: Sequence[Collection[str]], begun: Sequence[Descriptor | None]
    ) -> list[Any]:
        return [tuple(result) for result in tensors.tolist()]


class ObedientStage(BatchStage):
    """Does what the input array says: [seconds] to sleep, or one of the orders above: to end the process, to raise, or
    to hold on until it is released."""

    stage = "encoder"

    def __init__(self, budget: int = 4, max_queued_windows: int = 256, breaks: int = 0):
        """breaks: so many calls end with an error that is no window's."""
        self._breaks = breaks
        self._hides_gpu = False
        self._released = threading.Event()
        super().__init__(StageSettings(max_queued_windows=max_queued_windows), torch.device("cpu"))
        # a budget of its windows' cost, which stays
        bounds = self.bounds(FeedbackSettings(enabled=False), least=1, most=budget)
        self._follow_load(FeedbackSettings(enabled=False), bounds)
        self.export = Returned()

    async def process(self, call: StageCall, *, replica: str | None = None) -> AsyncIterator[list[Event]]:
        if self._breaks > 0:
            self._breaks -= 1
            self._late = asyncio.create_task(self._cancel_late([window.window_id for window in call.windows]))
            raise RuntimeError("the call breaks off")
        async for events in super().process(call, replica=replica):
            yield events

    async def _cancel_late(self, window_ids: list[str]) -> None:
        """As where a replica hears late that a call's connection is gone."""
        await asyncio.sleep(0.5)
        await self.cancel(window_ids)

    async def release(self) -> None:
        self._released.set()

    async def hide_gpu(self) -> None:
        """From the next who asks for it."""
        self._hides_gpu = True

    async def gpu(self, *, replica: str | None = None) -> str | None:
        if self._hides_gpu:
            self._hides_gpu = False
            raise RuntimeError("the call breaks off")
        return "GPU-of-this-test"

    def _batch(self, inputs: list[Input]) -> torch.Tensor:
        orders = [float(array[0]) for array in inputs]
        if ENDS in orders:
            os._exit(1)
        if RAISES in orders:
            raise ValueError("as ordered")
        if HOLDS in orders:
            self._released.wait()
            self._released.clear()
        time.sleep(max(0.0, *orders))
        return torch.tensor([(os.getpid(), len(orders)) for _ in orders])  # who did it, and the size of the batch
