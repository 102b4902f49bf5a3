"""From what Prometheus has of the replicas to what the policy sees (pure).

Every part of a reading is a gauge of its own (``serve_app/metrics.py``), so a reading is put together from the series
of one replica. Its time is a gauge, too: what Ray's ports and Prometheus have kept since makes a reading no newer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from k8s.config import ControllerSettings
from k8s.prometheus import Sample
from k8s.serve import ServeStatus
from serve_app.scaling.load import Signals, stage_signals
from serve_app.scaling.readings import (
    API,
    GPU_PARTS,
    STAGES,
    CallerReading,
    Reading,
    ReplicaReading,
    Stage,
    decode,
)

REPLICA_GAUGES: Mapping[str, str] = {
    "ray_whisper_stage_reading_time_seconds": "at",
    "ray_whisper_stage_busy": "busy",
    "ray_whisper_stage_gpu_share": "gpu_share",
    "ray_whisper_sm_utilization": "sm_utilization",
    "ray_whisper_dram_utilization": "dram_utilization",
    "ray_whisper_stage_saturation": "saturation",
    "ray_whisper_stage_fill": "fill",
    "ray_whisper_stage_queue_windows": "queued_windows",
    "ray_whisper_stage_queue_audio_seconds": "queued_s",
    "ray_whisper_stage_oldest_wait_seconds": "oldest_wait_s",
    "ray_whisper_stage_running_windows": "running_windows",
    "ray_whisper_stage_rate": "rate",
    "ray_whisper_stage_budget_at_bound": "budget_at_bound",
    "ray_whisper_stage_done_audio_seconds_per_second": "done_s",
}
"""Metric → part of a ``ReplicaReading``. The GPU's UUID is a label."""

CALLER_GAUGES: Mapping[str, str] = {
    "ray_whisper_caller_reading_time_seconds": "at",
    "ray_whisper_requests_active": "active",
    "ray_whisper_caller_arrived_audio_seconds": "arrived_s",
}
CALLER_STAGE_GAUGES: Mapping[str, str] = {
    "ray_whisper_credit_queue_windows": "windows",
    "ray_whisper_credit_queue_audio_seconds": "s",
    "ray_whisper_credit_oldest_wait_seconds": "oldest_wait_s",
}
"""Metric → part of a ``CallerReading``; of the second kind each stage has one."""

GPU_MEMORY = "ray_whisper_gpu_memory_used_bytes"
"""Asked for its label: NVML names the GPU and its memory where it tells nothing else."""

STAND_IN = "cpu_busy"
"""Kind of a CPU replica's series in place of a GPU's utilization."""

DCGM_GAUGES: Mapping[str, str] = {
    "DCGM_FI_PROF_SM_ACTIVE": "sm_utilization",
    "DCGM_FI_PROF_DRAM_ACTIVE": "dram_utilization",
}
DCGM_RANGE_S = 60
"""A range has its samples' own times; the last of it is what is looked at."""


def application_query(settings: ControllerSettings) -> str:
    """Everything that replicas and callers tell, in one query."""
    names = "|".join([*REPLICA_GAUGES, *CALLER_GAUGES, *CALLER_STAGE_GAUGES, GPU_MEMORY])
    return f"{{{_matchers(names, settings.prometheus_selector)}}}"


def dcgm_query(settings: ControllerSettings) -> str:
    """Ratios of 0 to 1 of every GPU; dcgm-exporter's own list of counters leaves them out (docs/scaling.md)."""
    return f"{{{_matchers('|'.join(DCGM_GAUGES), settings.dcgm_selector)}}}[{DCGM_RANGE_S}s]"


def _matchers(names: str, selector: str) -> str:
    return ",".join(part for part in (f'__name__=~"{names}"', selector) if part)


@dataclass(slots=True)
class _Found:
    """What one exporter says of one replica."""

    values: dict[str, float] = field(default_factory=dict)
    gpu: str | None = None

    @property
    def at(self) -> float:
        return self.values.get("at", -math.inf)


def rebuilt(
    *,
    application: Iterable[Sample],
    dcgm: Sequence[Sample] | None,
    serve: ServeStatus,
    targets: Mapping[Stage, int],
    gpus: Mapping[Stage, float],
    before: Signals | None = None,
) -> Signals:
    """application: samples of ``application_query``. dcgm: of ``dcgm_query``; None where the replicas' own count.
    targets: replicas last asked for. before: what was rebuilt last.

    Readings are of the replicas that Serve says run. One that cannot be put together, because a series is missing or
    has no number, counts as none, and the one before stays: its own time says how old it is. On a busy node Ray's port
    leaves out gauges for a moment now and then.
    """
    replicas, callers = _grouped(application)
    stages = {}
    for stage in STAGES:
        running = serve.running(stage)
        readings = _readings(ReplicaReading, replicas[stage], running)
        readings = {name: replace(reading, gpu=replicas[stage][name].gpu) for name, reading in readings.items()}
        if dcgm is not None:
            readings = _joined(readings, dcgm)
        if before is not None:
            readings = _newest(before.stages[stage].readings, readings, running)
        stages[stage] = stage_signals(target=targets[stage], ready=len(running), gpus=gpus[stage], readings=readings)
    calling = _readings(CallerReading, callers, serve.running(API))
    if before is not None:
        calling = _newest(before.callers, calling, serve.running(API))
    return Signals(stages, calling)


def _newest(before: Mapping[str, Reading], now: Mapping[str, Reading], running: Iterable[str]) -> dict[str, Reading]:
    """Of each replica that runs, by id."""
    found: dict[str, Reading] = {}
    for replica in running:
        known = [readings[replica] for readings in (before, now) if replica in readings]
        if known:
            found[replica] = max(known, key=lambda reading: reading.at)
    return found


def _grouped(samples: Iterable[Sample]) -> tuple[dict[Stage, dict[str, _Found]], dict[str, _Found]]:
    """By stage and replica, and callers by replica. Where two exporters, or two scrapes of one, tell of a replica, the
    newer one counts, whole: parts of several readings are none."""
    replicas: dict[tuple[Stage, str, Any], _Found] = defaultdict(_Found)
    callers: dict[tuple[str, Any], _Found] = defaultdict(_Found)
    for sample in samples:
        labels = dict(sample.labels)
        stage, replica = labels.pop("stage", ""), labels.pop("replica", "")
        gpu, kind = labels.pop("gpu", "cpu"), labels.pop("kind", "")
        source = tuple(sorted(labels.items()))
        if (part := CALLER_GAUGES.get(sample.name)) is not None:
            callers[replica, source].values[part] = sample.value
        elif (part := CALLER_STAGE_GAUGES.get(sample.name)) is not None:
            callers[replica, source].values[f"{stage}_{part}"] = sample.value
        else:
            found = replicas[stage, replica, source]
            if gpu != "cpu":
                found.gpu = gpu
            if (part := REPLICA_GAUGES.get(sample.name)) is not None and kind != STAND_IN:
                found.values[part] = sample.value
    by_stage: dict[Stage, dict[str, _Found]] = {stage: {} for stage in STAGES}
    for (stage, replica, _), found in replicas.items():
        if stage in by_stage and (replica not in by_stage[stage] or found.at > by_stage[stage][replica].at):
            by_stage[stage][replica] = found
    by_caller: dict[str, _Found] = {}
    for (replica, _), found in callers.items():
        if replica not in by_caller or found.at > by_caller[replica].at:
            by_caller[replica] = found
    return by_stage, by_caller


def _missing(kind: type[Reading]) -> dict[str, float]:
    """Parts that may be unknown, for a gauge that is not known is not set. GPUs are labels here, and not in parts."""
    hints: dict[str, Any] = get_type_hints(kind)
    return dict.fromkeys([*GPU_PARTS, *(name for name, hint in hints.items() if hint == float | None)], math.nan)


def _readings(kind: type[Reading], found: Mapping[str, _Found], running: Iterable[str]) -> dict[str, Reading]:
    readings: dict[str, Reading] = {}
    for replica in running:
        if replica in found:
            numbers = {part: v if math.isfinite(v) else math.nan for part, v in found[replica].values.items()}
            try:
                readings[replica] = decode(kind, {**_missing(kind), **numbers})
            except ValueError:
                continue
    return readings


def _joined(readings: Mapping[str, ReplicaReading], dcgm: Sequence[Sample]) -> dict[str, ReplicaReading]:
    """With the utilizations that DCGM has of the replicas' GPUs. A reading is as old as its oldest part, and one whose
    GPU DCGM does not know is none. Replicas without a GPU stay as they are."""
    measured: dict[str, dict[str, Sample]] = defaultdict(dict)
    for sample in dcgm:
        part = DCGM_GAUGES.get(sample.name)
        if part is not None and math.isfinite(sample.value) and (uuid := sample.labels.get("UUID")):
            measured[_bare(uuid)][part] = sample
    joined = {}
    for name, reading in readings.items():
        if reading.gpu is None:
            joined[name] = reading
        elif (sm := measured[_bare(reading.gpu)].get("sm_utilization")) is not None:
            dram = measured[_bare(reading.gpu)].get("dram_utilization")
            joined[name] = replace(
                reading,
                at=min(reading.at, sm.at),
                sm_utilization=sm.value,
                dram_utilization=reading.dram_utilization if dram is None else dram.value,
            )
    return joined


def _bare(uuid: str) -> str:
    """dcgm-exporter writes GPU-… before it."""
    return uuid.removeprefix("GPU-").lower()
