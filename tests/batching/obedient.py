"""A stage for tests of the batching handle: real replicas, whose work is to sleep, fail or die as a window asks."""

from __future__ import annotations

import os
import time
from typing import Any

from serve_app.settings import StageSettings
from serve_app.stages.replica import Array, BatchStage


class ObedientStage(BatchStage):
    """Does what the input array says: [seconds] to sleep; -1 ends the process, -2 raises."""

    def __init__(self, budget: int = 4, max_queued_windows: int = 256):
        super().__init__(StageSettings(max_queued_windows=max_queued_windows))
        self.budget = budget

    def _batch(self, inputs: list[Array]) -> list[Any]:
        orders = [float(array[0]) for array in inputs]
        if -1.0 in orders:
            os._exit(1)
        if -2.0 in orders:
            raise ValueError("as ordered")
        time.sleep(max(orders))
        return [(os.getpid(), len(orders)) for _ in orders]  # who did it, and the size of the batch
