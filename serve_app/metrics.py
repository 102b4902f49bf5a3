"""Every metric, declared once. They go through Ray: a node's metrics port shows them as ``ray_<name>``, counters with
``_total`` behind.

``docs/metrics.md`` explains them; a test compares it with what is declared here. Ray takes a lock and some 5 µs for
each value, so gauges are set once a second, and what happens in a stage is counted there and handed over once a second.

NOTES: Ray forgets a gauge that has not been set for two of its reporting intervals, which is how the gauges of a dead
replica go away. Of a histogram it keeps the buckets, and takes their middles for the values in its sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from ray.util import metrics as ray_metrics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
SPEEDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)

DECLARED: dict[str, Metric] = {}
"""By name."""


class Metric:
    """A metric as it is declared. labels: every value is recorded with all of them. unit: of its values; a share is 0
    to 1. Ray's side of it is made when it is first used, in the process that uses it."""

    kind: ClassVar[Literal["counter", "gauge", "histogram"]]

    def __init__(self, name: str, unit: str, labels: Sequence[str], help: str):
        if name in DECLARED:
            raise ValueError(f"the metric {name} is declared twice")
        self.name, self.unit, self.labels, self.help = name, unit, tuple(labels), help
        self._ray: Any = None
        DECLARED[name] = self

    @property
    def exported(self) -> str:
        """Its name on the metrics port."""
        return f"ray_{self.name}"

    def _make(self) -> Any:
        raise NotImplementedError

    def _of_ray(self, labels: Mapping[str, str]) -> Any:
        if len(labels) != len(self.labels) or any(label not in labels for label in self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        if self._ray is None:
            self._ray = self._make()
        return self._ray


class Counter(Metric):
    kind = "counter"

    @property
    def exported(self) -> str:
        return f"ray_{self.name}_total"

    def _make(self) -> ray_metrics.Counter:
        return ray_metrics.Counter(self.name, self.help, self.labels)

    def start(self, **labels: str) -> None:
        """Shows the counter at zero. One that appears with its first event hides that event from ``rate``."""
        # NOTES: ``inc`` refuses zero, and there is no other public way
        self._of_ray(labels)._record(0.0, labels)

    def add(self, value: float = 1.0, /, **labels: str) -> None:
        if value > 0:
            self._of_ray(labels).inc(value, labels)


class Gauge(Metric):
    kind = "gauge"

    def _make(self) -> ray_metrics.Gauge:
        return ray_metrics.Gauge(self.name, self.help, self.labels)

    def set(self, value: float | None, /, **labels: str) -> None:
        """None, for what is not known, sets nothing."""
        if value is not None:
            self._of_ray(labels).set(float(value), labels)


class Histogram(Metric):
    kind = "histogram"

    def __init__(self, name: str, unit: str, labels: Sequence[str], help: str, *, buckets: Sequence[float]):
        super().__init__(name, unit, labels, help)
        self.buckets = tuple(buckets)

    def _make(self) -> ray_metrics.Histogram:
        return ray_metrics.Histogram(self.name, self.help, list(self.buckets), self.labels)

    def observe(self, value: float, /, **labels: str) -> None:
        self._of_ray(labels).observe(value, labels)


STAGE_OUTCOMES = ("done", "failed", "cancelled", "expired", "input_lost")
RETRY_REASONS = ("replica_died", "call_broke", "refused", "input_lost")
ERROR_REASONS = ("failed", "deadline", "gave_up")
REQUEST_OUTCOMES = ("done", "invalid", "overloaded", "deadline", "failed", "cancelled")


def start_stage(stage: str) -> None:
    """Shows a replica's counters."""
    for outcome in STAGE_OUTCOMES:
        STAGE_WINDOWS.start(stage=stage, outcome=outcome)
    for counter in (STAGE_AUDIO, STAGE_OPERATIONS, STAGE_BATCHED):
        counter.start(stage=stage)
    if stage == "decoder":
        TOKENS.start(stage=stage)


def start_caller(stages: Iterable[str]) -> None:
    """Shows an API replica's counters."""
    for stage in stages:
        for reason in RETRY_REASONS:
            STAGE_RETRIES.start(stage=stage, reason=reason)
        for reason in ERROR_REASONS:
            STAGE_ERRORS.start(stage=stage, reason=reason)
    for outcome in REQUEST_OUTCOMES:
        REQUESTS.start(outcome=outcome)
    REQUEST_AUDIO.start()


# ---- the GPU, once a second, by each replica that computes on it ----

_GPU = ("stage", "replica", "gpu")

SM_UTILIZATION = Gauge(
    "whisper_sm_utilization",
    "share",
    (*_GPU, "kind"),
    "Busy share of the GPU's multiprocessors; kind says how it was counted: gpm, process or kernel_time. Kind cpu_busy "
    "is a CPU replica's own busy share in its place.",
)
SM_OCCUPANCY = Gauge(
    "whisper_sm_occupancy", "share", _GPU, "Warps on the GPU's multiprocessors, of as many as fit. Hopper and later."
)
TENSOR_ACTIVITY = Gauge(
    "whisper_tensor_activity", "share", _GPU, "Share of the time in which Tensor Cores worked. Hopper and later."
)
DRAM_UTILIZATION = Gauge(
    "whisper_dram_utilization",
    "share",
    (*_GPU, "kind"),
    "Of the GPU memory's bandwidth (kind gpm), or of the time in which it was touched (other kinds).",
)
DRAM_BANDWIDTH = Gauge(
    "whisper_dram_bytes_per_second", "bytes/s", _GPU, "Traffic of the GPU's memory. Hopper and later."
)
GPU_MEMORY_USED = Gauge("whisper_gpu_memory_used_bytes", "bytes", _GPU, "GPU memory in use, by all processes.")
GPU_MEMORY_TOTAL = Gauge("whisper_gpu_memory_total_bytes", "bytes", _GPU, "GPU memory that there is.")
GPU_POWER = Gauge("whisper_gpu_power_watts", "W", _GPU, "What the GPU draws.")
GPU_TEMPERATURE = Gauge("whisper_gpu_temperature_celsius", "°C", _GPU, "The GPU's temperature.")

# ---- a stage's replica ----

_REPLICA = ("stage", "replica")

STAGE_BUSY = Gauge("whisper_stage_busy", "share", _REPLICA, "Share of the last second in which a batch ran.")
STAGE_GPU_SHARE = Gauge(
    "whisper_stage_gpu_share", "share", _REPLICA, "Share of the last second in which its work held the GPU."
)
STAGE_TURN = Gauge(
    "whisper_stage_turn", "share", _REPLICA, "Share of the last second in which it had the turn on its GPU."
)
STAGE_TURN_WAIT = Gauge(
    "whisper_stage_turn_wait", "share", _REPLICA, "Share of the last second in which it waited for its turn."
)
STAGE_SATURATION = Gauge(
    "whisper_stage_saturation",
    "share",
    _REPLICA,
    "SM utilization while this stage alone ran full batches, at its start.",
)
STAGE_FILL = Gauge("whisper_stage_fill", "share", _REPLICA, "Of the batches' budget, or of the slots, that was used.")
STAGE_BUDGET = Gauge(
    "whisper_stage_budget", "samples, windows, slots", _REPLICA, "What a batch may hold now, in the stage's own unit."
)
STAGE_RATE = Gauge(
    "whisper_stage_rate", "audio s/s", _REPLICA, "Seconds of audio that a replica does in a second of being busy."
)
STAGE_QUEUE = Gauge("whisper_stage_queue_windows", "windows", _REPLICA, "Windows that wait in the replica.")
STAGE_QUEUE_AUDIO = Gauge("whisper_stage_queue_audio_seconds", "s", _REPLICA, "Seconds of audio in these.")
STAGE_OLDEST_WAIT = Gauge("whisper_stage_oldest_wait_seconds", "s", _REPLICA, "How long the first of these has waited.")
STAGE_RUNNING = Gauge("whisper_stage_running_windows", "windows", _REPLICA, "Windows in its batch or slots.")
STAGE_AT_BOUND = Gauge("whisper_stage_budget_at_bound", "0 or 1", _REPLICA, "Its batches cannot grow any more.")
STAGE_DONE = Gauge(
    "whisper_stage_done_audio_seconds_per_second",
    "audio s/s",
    _REPLICA,
    "Seconds of audio that it finishes a second, smoothed over some seconds.",
)
STAGE_TIME = Gauge(
    "whisper_stage_reading_time_seconds",
    "Unix time",
    _REPLICA,
    "When its gauges were set: how old they are, whoever has kept them since.",
)
STAGE_BATCH = Histogram(
    "whisper_stage_batch_windows", "windows", ("stage",), "Windows in a batch, or in a decoding step.", buckets=SIZES
)
STAGE_BATCHED = Counter(
    "whisper_stage_batched_windows",
    "windows",
    ("stage",),
    "Windows of all batches, or decoding steps, added up: by their number it is the mean batch size.",
)
STAGE_WAIT = Histogram(
    "whisper_stage_wait_seconds", "s", ("stage",), "A window's wait in the replica's queue.", buckets=SECONDS
)
STAGE_WINDOWS = Counter(
    "whisper_stage_windows",
    "windows",
    ("stage", "outcome"),
    "Windows that left a replica: done, failed, cancelled, expired, input_lost.",
)
STAGE_AUDIO = Counter("whisper_stage_audio_seconds", "s", ("stage",), "Seconds of audio in windows that were done.")
STAGE_OPERATIONS = Counter(
    "whisper_stage_operations",
    "floating-point operations",
    ("stage",),
    "The engine's own count of its work; its rate is the compute throughput, FLOP/s.",
)
TOKENS = Counter("whisper_tokens", "tokens", ("stage",), "Tokens of windows that were decoded.")

# ---- the callers of the stages: API replicas ----

STAGE_LATENCY = Histogram(
    "whisper_stage_latency_seconds",
    "s",
    ("stage",),
    "From when a window asks for a stage until it has its result: waits, transport and work.",
    buckets=SECONDS,
)
STAGE_RETRIES = Counter(
    "whisper_stage_retries",
    "windows",
    ("stage", "reason"),
    "Windows sent again: replica_died, call_broke, refused (its queue was full), input_lost.",
)
STAGE_ERRORS = Counter(
    "whisper_stage_errors",
    "windows",
    ("stage", "reason"),
    "Windows given up: failed (by the replica's own error), deadline, gave_up (after several deaths of replicas).",
)
CREDIT_QUEUE = Gauge(
    "whisper_credit_queue_windows", "windows", _REPLICA, "Windows that wait in an API replica until a stage takes them."
)
CREDIT_QUEUE_AUDIO = Gauge("whisper_credit_queue_audio_seconds", "s", _REPLICA, "Seconds of audio in these.")
CREDIT_OLDEST_WAIT = Gauge(
    "whisper_credit_oldest_wait_seconds", "s", _REPLICA, "How long the first of these has waited."
)
CALLER_ARRIVED = Gauge(
    "whisper_caller_arrived_audio_seconds",
    "s",
    ("replica",),
    "Seconds of audio that came to the first stage in a second.",
)
CALLER_TIME = Gauge(
    "whisper_caller_reading_time_seconds", "Unix time", ("replica",), "When an API replica's gauges were set."
)

# ---- requests ----

REQUESTS = Counter(
    "whisper_requests",
    "requests",
    ("outcome",),
    "Recordings: done, invalid, overloaded, deadline, failed, cancelled.",
)
REQUESTS_ACTIVE = Gauge("whisper_requests_active", "requests", ("replica",), "Recordings that an API replica works on.")
REQUEST_SECONDS = Histogram(
    "whisper_request_seconds", "s", (), "From a recording's arrival to its transcript.", buckets=SECONDS
)
REQUEST_SPEED = Histogram(
    "whisper_request_rtfx", "audio s/s", (), "A recording's seconds by those it took.", buckets=SPEEDS
)
REQUEST_AUDIO = Counter(
    "whisper_request_audio_seconds", "s", (), "Seconds of audio transcribed; its rate is the application's RTFx."
)

# ---- scaling ----

SCALING_DECISIONS = Counter(
    "whisper_scaling_decisions",
    "decisions",
    ("stage", "direction", "reason"),
    "What the autoscaling policy decided (up, down, hold), and why.",
)
SCALING_WANTED = Gauge("whisper_scaling_wanted_replicas", "replicas", ("stage",), "Replicas that the policy asks for.")
SCALING_CURRENT = Gauge("whisper_scaling_current_replicas", "replicas", ("stage",), "Replicas that run.")
