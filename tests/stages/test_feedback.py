"""A replica's batches follow its load: a real replica, whose work is to sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from serve_app.batching.feedback import FeedbackSettings
from serve_app.batching.messages import Done, StageCall, StageWindow
from serve_app.engine.options import Priority
from serve_app.settings import StageSettings
from serve_app.stages.replica import BatchStage
from serve_app.stages.transport import Input, StoredDescriptor
from tests.batching.obedient import Returned

SLEEP_S = 0.3
MOST = 8


class SleepingStage(BatchStage):
    """Each batch takes as long as another, whatever its size."""

    stage = "encoder"

    def __init__(self, settings: FeedbackSettings):
        super().__init__(StageSettings(), torch.device("cpu"))
        self.sizes: list[int] = []
        self.export = Returned()
        self._follow_load(settings, self.bounds(settings, least=1, most=MOST))

    def _batch(self, inputs: list[Input]) -> torch.Tensor:
        self.sizes.append(len(inputs))
        time.sleep(SLEEP_S)
        return torch.zeros(len(inputs), 1)


def window(name: str, priority: Priority = "normal") -> StageWindow:
    """Its input has arrived."""
    arrived: asyncio.Future[np.ndarray[Any, Any]] = asyncio.get_running_loop().create_future()
    arrived.set_result(np.zeros(1, np.float32))
    return StageWindow(name, StoredDescriptor(cast(Any, arrived)), 1.0, time.time() + 60, priority)


async def run(stage: BatchStage, windows: Sequence[StageWindow]) -> float:
    """Seconds until all are done."""
    began = time.monotonic()
    done = [event async for events in stage.process(StageCall(list(windows))) for event in events]
    assert sum(isinstance(event, Done) for event in done) == len(windows)
    return time.monotonic() - began


async def test_batches_that_take_too_long_become_smaller_where_the_load_lets_them() -> None:
    # the encoder's share of the objective is 0.6 s, and a window has to see two batches through
    stage = SleepingStage(FeedbackSettings(latency_objective_s=2.0))
    assert (stage.budget, stage.budget_at_bound) == (MOST, True)
    for i in range(12):
        await run(stage, [window(f"{i}")])
        await asyncio.sleep(0.2)
    assert stage.budget < MOST
    assert stage.feedback.state.reason.startswith("smaller: batches take")
    settled = stage.budget
    await run(stage, [window(f"many {i}") for i in range(MOST)])
    assert max(stage.sizes) <= settled


async def test_with_feedback_off_batches_stay() -> None:
    stage = SleepingStage(FeedbackSettings(latency_objective_s=0.1, enabled=False))
    for i in range(8):
        await run(stage, [window(f"{i}")])
    assert (stage.budget, stage.feedback.wait_s) == (MOST, 0.0)


async def test_small_batches_that_keep_a_replica_busy_are_waited_for_and_urgent_ones_are_not() -> None:
    stage = SleepingStage(FeedbackSettings(latency_objective_s=20.0, max_wait_s=0.5))
    for i in range(16):  # one after the other, without a pause
        await run(stage, [window(f"{i}")])
    assert stage.feedback.wait_s > 0.1
    waited = await run(stage, [window("alone")])
    assert waited > SLEEP_S + 0.5 * stage.feedback.wait_s
    urgent = [await run(stage, [window(f"urgent {i}", "interactive")]) for i in range(3)]
    assert min(urgent) < waited
    full = [await run(stage, [window(f"full {i} of {k}") for i in range(MOST)]) for k in range(3)]
    assert min(full) < waited
