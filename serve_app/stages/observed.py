"""What a stage's replica tells of itself once a second: its metrics, and its reading for the autoscaling policy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from ray import serve
from ray.serve.exceptions import RayServeException

from serve_app import metrics
from serve_app.scaling.nvml import GpuReader, GpuSample
from serve_app.scaling.readings import ReplicaReading
from serve_app.scaling.signals import Observer, Period, StageMeter
from serve_app.stages.turns import GpuTurns


@dataclass(frozen=True, slots=True)
class QueueState:
    """Windows that a replica holds, and the seconds of audio in those that wait. arrived: Unix time of the first of
    these; None where none waits."""

    waiting: int
    waiting_s: float
    arrived: float | None
    running: int

    def oldest_wait_s(self, now: float) -> float:
        return 0.0 if self.arrived is None else max(0.0, now - self.arrived)


class Observed(Protocol):
    """A replica, as far as it is observed from another thread."""

    stage: str
    meter: StageMeter
    budget: float
    turns: GpuTurns | None

    @property
    def budget_at_bound(self) -> bool: ...

    def queue_state(self) -> QueueState: ...


class StageObserver:
    """Takes a replica's measure every second. gpu: the UUID of its GPU; None on a CPU. saturation: as in
    ``ReplicaReading``."""

    def __init__(self, replica: Observed, gpu: str | None, saturation: float = 1.0):
        self._replica, self._gpu, self._saturation = replica, gpu, saturation
        self._reader = None if gpu is None else GpuReader(gpu)
        self._labels = {"stage": replica.stage, "replica": replica_name()}
        self._gpu_labels = {**self._labels, "gpu": gpu or "cpu"}
        self._sample: GpuSample | None = None
        self._period = Period(0.0)
        self._turned = time.monotonic(), (0.0, 0.0)  # when turns were last looked at, and what was spent by then
        metrics.start_stage(replica.stage)
        self._observer = Observer(self._observe)

    def reading(self) -> ReplicaReading:
        """The last second's work, and the queue as it is now."""
        now, queue, period, sample = time.time(), self._replica.queue_state(), self._period, self._sample
        return ReplicaReading(
            at=now,
            busy=period.busy,
            gpu_share=period.gpu_share,
            sm_utilization=None if sample is None else sample.sm_utilization,
            dram_utilization=None if sample is None else sample.dram_utilization,
            saturation=self._saturation,
            fill=period.fill,
            queued_windows=queue.waiting,
            queued_s=queue.waiting_s,
            oldest_wait_s=queue.oldest_wait_s(now),
            running_windows=queue.running,
            rate=period.rate,
            budget_at_bound=self._replica.budget_at_bound,
            done_s=period.done_s,
            gpu=self._gpu,
        )

    @property
    def utilization(self) -> float | None:
        """Of the GPU's multiprocessors or memory, whichever was used more in the last second, as a share of what this
        stage's full batches use; None where it cannot be read. May be asked by any thread."""
        sample = self._sample
        if sample is None or sample.sm_utilization is None:
            return None
        return min(1.0, max(sample.sm_utilization / self._saturation, sample.dram_utilization or 0.0))

    def _observe(self) -> None:
        if self._reader is not None:
            self._sample = self._reader.read()
        self._period = self._replica.meter.take()
        self._record_gpu(self._sample, self._period)
        self._record_period(self._period)
        self._record_turns()
        self._record_state()

    def _record_gpu(self, sample: GpuSample | None, period: Period) -> None:
        labels = self._gpu_labels
        if sample is None:
            metrics.SM_UTILIZATION.set(period.busy, **labels, kind="cpu_busy")
            return
        kind = sample.kind or "none"
        metrics.SM_UTILIZATION.set(sample.sm_utilization, **labels, kind=kind)
        metrics.DRAM_UTILIZATION.set(sample.dram_utilization, **labels, kind=kind)
        metrics.SM_OCCUPANCY.set(sample.sm_occupancy, **labels)
        metrics.TENSOR_ACTIVITY.set(sample.tensor_activity, **labels)
        metrics.DRAM_BANDWIDTH.set(sample.dram_bytes_per_s, **labels)
        metrics.GPU_MEMORY_USED.set(sample.memory_used, **labels)
        metrics.GPU_MEMORY_TOTAL.set(sample.memory_total, **labels)
        metrics.GPU_POWER.set(sample.power_w, **labels)
        metrics.GPU_TEMPERATURE.set(sample.temperature_c, **labels)

    def _record_period(self, period: Period) -> None:
        stage = self._replica.stage
        metrics.STAGE_BUSY.set(period.busy, **self._labels)
        metrics.STAGE_GPU_SHARE.set(period.gpu_share, **self._labels)
        metrics.STAGE_FILL.set(period.fill, **self._labels)
        metrics.STAGE_RATE.set(period.rate, **self._labels)
        metrics.STAGE_DONE.set(period.done_s, **self._labels)
        for windows, times in period.batches.items():
            for _ in range(times):
                metrics.STAGE_BATCH.observe(windows, stage=stage)
            metrics.STAGE_BATCHED.add(windows * times, stage=stage)
        for seconds in period.waits:
            metrics.STAGE_WAIT.observe(seconds, stage=stage)
        for outcome, windows in period.outcomes.items():
            metrics.STAGE_WINDOWS.add(windows, stage=stage, outcome=outcome)
        metrics.STAGE_AUDIO.add(period.audio_s, stage=stage)
        metrics.STAGE_OPERATIONS.add(period.operations, stage=stage)
        metrics.TOKENS.add(period.tokens, stage=stage)

    def _record_turns(self) -> None:
        turns = self._replica.turns
        if turns is None:
            return
        before, spent_before = self._turned
        self._turned = now, spent = time.monotonic(), turns.spent()
        waited, held = (min(1.0, (b - a) / (now - before)) for a, b in zip(spent_before, spent, strict=True))
        metrics.STAGE_TURN_WAIT.set(waited, **self._labels)
        metrics.STAGE_TURN.set(held, **self._labels)

    def _record_state(self) -> None:
        now, queue = time.time(), self._replica.queue_state()
        metrics.STAGE_SATURATION.set(self._saturation, **self._labels)
        metrics.STAGE_BUDGET.set(self._replica.budget, **self._labels)
        metrics.STAGE_QUEUE.set(queue.waiting, **self._labels)
        metrics.STAGE_QUEUE_AUDIO.set(queue.waiting_s, **self._labels)
        metrics.STAGE_OLDEST_WAIT.set(queue.oldest_wait_s(now), **self._labels)
        metrics.STAGE_RUNNING.set(queue.running, **self._labels)
        metrics.STAGE_AT_BOUND.set(self._replica.budget_at_bound, **self._labels)
        metrics.STAGE_TIME.set(now, **self._labels)


def replica_name() -> str:
    """Serve's name of the replica that this process is; empty outside of one."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""
