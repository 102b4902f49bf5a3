"""From what the replicas of a stage say of themselves to what the stage as a whole carries (pure).

The policy decides from ``StageLoad`` alone, so that a simulator of large fleets can make one without a reading for
each of ten thousand replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.scaling.readings import STAGES, CallerReading, ReplicaReading, Stage

LEAST_UTILIZATION = 0.05
"""Under this a stage's throughput over its utilization says little of what it could do."""
LEAST_RATE = 1e-3
"""Seconds of audio a second: what claims to do less has measured nothing."""


@dataclass(frozen=True, slots=True)
class StageSignals:
    """A stage as the mount sees it.

    target: replicas last asked for. ready: that take work. pending: asked for, not ready yet.
    gpus: what one replica holds of a GPU.
    readings: the last reading of each replica, by its id; some may be missing or old.
    devices: what tells apart the GPUs (UUID, or the node where nodes have one), by replica id, where several stages
        share one; a replica that is not named has its GPU to itself.
    """

    target: int
    ready: int
    pending: int
    gpus: float = 1.0
    readings: Mapping[str, ReplicaReading] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)


def stage_signals(*, target: int, ready: int, gpus: float, readings: Mapping[str, ReplicaReading]) -> StageSignals:
    """Of replicas that name their GPUs; what is asked for and not ready is starting."""
    devices = {replica: reading.gpu for replica, reading in readings.items() if reading.gpu is not None}
    return StageSignals(target, ready, max(0, target - ready), gpus, readings, devices)


@dataclass(frozen=True, slots=True)
class Signals:
    """All that the policy sees. callers: the last reading of each API replica, by its id."""

    stages: Mapping[Stage, StageSignals]
    callers: Mapping[str, CallerReading] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageLoad:
    """A stage, or all stages of pods, over the last second.

    fresh: ready replicas with a reading that is not stale. at: Unix time of the newest such reading, None without any.
    throughput: seconds of audio done in a second, by all replicas.
    utilization: 0 to 1, of the saturation point: SM utilization, for the decoder the larger of it, DRAM and fill.
    rate: seconds of audio that one replica would do in a second at its saturation point, by what is done at the present
        utilization; None where unknown. own_rate: the same by what replicas measured of their batches.
    queued_s: seconds of audio that wait. inlet_s: those of them that wait for the first stage.
    at_bound: share of the replicas whose batches cannot grow.
    arrived: seconds of audio that came to the application in a second, by its callers; None where they have not told.
    """

    target: int
    ready: int
    pending: int
    gpus: float
    fresh: int
    at: float | None
    throughput: float
    utilization: float
    rate: float | None
    queued_s: float
    inlet_s: float
    oldest_wait_s: float
    at_bound: float
    on_gpu: bool = True
    own_rate: float | None = None
    arrived: float | None = None


def loads(signals: Signals, now: float, stale_after_s: float) -> tuple[dict[Stage, StageLoad], dict[Stage, float]]:
    """Each stage's load, and its utilization of the device alone, without DRAM and fill. Stale readings are out."""

    def is_fresh(reading: ReplicaReading | CallerReading) -> bool:
        return abs(now - reading.at) <= stale_after_s

    fresh = {
        stage: {name: reading for name, reading in signal.readings.items() if is_fresh(reading)}
        for stage, signal in signals.stages.items()
    }
    callers = [reading for reading in signals.callers.values() if is_fresh(reading)]
    told = [reading.arrived_s for reading in callers if reading.arrived_s is not None]
    arrived = sum(told) if told and len(told) == len(signals.callers) else None
    totals: dict[str, float] = defaultdict(float)
    for stage, readings in fresh.items():
        for name, reading in readings.items():
            device = signals.stages[stage].devices.get(name)
            if device is not None:
                totals[device] += reading.gpu_share or 0.0

    def part(stage: Stage, name: str, reading: ReplicaReading) -> float:
        """Of its GPU's work, what is this replica's."""
        total = totals.get(signals.stages[stage].devices.get(name, ""), 0.0)
        return 1.0 if reading.gpu_share is None or total <= 0 else reading.gpu_share / total

    found: dict[Stage, StageLoad] = {}
    utilization: dict[Stage, float] = {}
    for stage, signal in signals.stages.items():
        parts = [(reading, part(stage, name, reading)) for name, reading in fresh[stage].items()]
        held = [_held(stage, reading) for reading in callers]
        found[stage] = _stage_load(stage, signal, parts, held, arrived)
        utilization[stage] = _mean([device_utilization(*each) for each in parts])
    return found, utilization


def device_utilization(reading: ReplicaReading, part: float) -> float:
    """The part of its GPU's SM utilization that is this replica's, of its own saturation point; 0 to 1.

    part: of the time that the GPU worked, the share for this replica. Without a GPU, or a driver that tells, the
    busy share stands in.
    """
    if reading.sm_utilization is None:
        return min(1.0, reading.busy)
    return min(1.0, reading.sm_utilization * part / max(reading.saturation, 0.01))


def utilization(stage: Stage, reading: ReplicaReading, part: float) -> float:
    """As ``device_utilization``; the decoder is bound by memory as often as by arithmetic, and by its slots, of which
    ``fill`` were used while it ran."""
    own = device_utilization(reading, part)
    if stage != "decoder":
        return own
    return min(1.0, max(own, (reading.dram_utilization or 0.0) * part, reading.fill * reading.busy))


def _held(stage: Stage, reading: CallerReading) -> tuple[float, float]:
    """What waits at a caller for a stage's credit: seconds of audio, and the oldest wait."""
    return getattr(reading, f"{stage}_s"), getattr(reading, f"{stage}_oldest_wait_s")


def _stage_load(
    stage: Stage,
    signals: StageSignals,
    fresh: Sequence[tuple[ReplicaReading, float]],
    held: Sequence[tuple[float, float]],
    arrived: float | None,
) -> StageLoad:
    """Where only some replicas have a fresh reading, the others are taken to be like them."""
    count = max(signals.ready, len(fresh))
    done = _mean([reading.done_s for reading, _ in fresh])
    used = _mean([utilization(stage, *each) for each in fresh])
    queued = _mean([reading.queued_s for reading, _ in fresh]) * count + sum(seconds for seconds, _ in held)
    waits = [reading.oldest_wait_s for reading, _ in fresh] + [wait for _, wait in held]
    return StageLoad(
        target=signals.target,
        ready=signals.ready,
        pending=signals.pending,
        gpus=signals.gpus,
        fresh=min(len(fresh), signals.ready),
        at=max((reading.at for reading, _ in fresh), default=None),
        throughput=done * count,
        utilization=used,
        rate=done / used if used >= LEAST_UTILIZATION and done >= LEAST_RATE else None,
        queued_s=queued,
        inlet_s=queued,
        oldest_wait_s=max(waits, default=0.0),
        at_bound=_mean([float(reading.budget_at_bound) for reading, _ in fresh]),
        on_gpu=any(reading.sm_utilization is not None for reading, _ in fresh),
        own_rate=_mean(own)
        if (own := [r for reading, _ in fresh if (r := reading.rate or 0.0) >= LEAST_RATE])
        else None,
        arrived=arrived,
    )


def pods(stages: Mapping[Stage, StageLoad], device: Mapping[Stage, float]) -> StageLoad:
    """All stages of pods that hold one replica of each, as one. On a GPU the stages' shares of it add up; on a CPU the
    busiest process is the bound.

    device: each stage's utilization of the device alone, 0 to 1.
    Raises ValueError where there is no stage.
    """
    order = [stages[stage] for stage in STAGES if stage in stages]
    if not order:
        raise ValueError(f"no stage among {sorted(stages)}")
    first = order[0]
    costs = [
        device[stage] * load.ready / load.throughput if load.throughput > 0 else 0.0
        for stage in STAGES
        if (load := stages.get(stage)) is not None
    ]
    on_gpu = any(load.on_gpu for load in order)
    cost = sum(costs) if on_gpu else max(costs)
    used = min(1.0, sum(device.values())) if on_gpu else 0.0
    used = max(used, *(load.utilization for load in order))
    known = 0 < cost <= 1 / LEAST_RATE and all(costs) and used >= LEAST_UTILIZATION
    own = [1 / load.own_rate for load in order if load.own_rate is not None]
    own_cost = sum(own) if on_gpu else max(own, default=0.0)
    # A window that waits for the decoder has only the decoder's work left.
    left = [sum(costs[i:]) / sum(costs) if known and on_gpu else 1.0 for i in range(len(order))]
    return StageLoad(
        target=max(load.target for load in order),
        ready=min(load.ready for load in order),
        pending=max(load.pending for load in order),
        gpus=sum(load.gpus for load in order),
        fresh=min(load.fresh for load in order),
        at=None if any(load.at is None for load in order) else max(load.at or 0.0 for load in order),
        throughput=first.throughput,
        utilization=used,
        rate=1 / cost if known else None,
        queued_s=sum(load.queued_s * share for load, share in zip(order, left, strict=True)),
        inlet_s=first.inlet_s,
        oldest_wait_s=max(load.oldest_wait_s for load in order),
        at_bound=max(load.at_bound for load in order),
        on_gpu=on_gpu,
        own_rate=1 / own_cost if len(own) == len(order) else None,
        arrived=first.arrived,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
