"""The fleet: stages that share GPUs or have their own, replicas that start late and die, and what their readings say.

One step is a second. Replicas of a stage are alike and share one queue, as the batching handle makes them (it sends
to the replica with the most credit), so a fleet of ten thousand costs no more to play than one of ten: what is
random by replica (deaths, cold starts, lost readings, noise of measurement) is drawn for all at once.

*Colocated*: the three processes of a pod share its GPU by time slices: equal ones where all have work, and what one
leaves is the others'; the encoder stops when it is a ring of windows ahead of the decoder. *Split*: each stage has
its own GPUs.

*Batches.* A stage's budget moves between a quarter of its bound and the bound: up by a quarter a second while
windows wait, slowly down while none do. At a share b of the bound a stage does 1.1 b / (b + 0.1) of what it does at
the bound. The decoder decodes in flight: 128 steps a window, each 4 ms and 12 ms times the share of its 256 slots
in use, so its slots fill by 0.25 u / (1 - 0.75 u) at a load u, while its GPU is busy nearly always.

*Readings.* SM utilization is the saturation point of each stage times the work it does, with 3 % of noise a GPU; a
stage's share of GPU time is what its batches held.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadtest.simulate.scenarios import SPLIT_GPUS, STAGES, START_UTILIZATION, WINDOW_S, Array, Trace, Work, arrivals
from serve_app.scaling.load import LEAST_UTILIZATION, Signals, StageLoad, StageSignals
from serve_app.scaling.readings import CallerReading, ReplicaReading

SATURATION: Mapping[str, float] = {"features": 0.5, "encoder": 0.92, "decoder": 0.8}
"""SM utilization in full batches."""
BUDGET_FLOOR, BUDGET_UP, BUDGET_DOWN = 0.25, 1.25, 0.97
SLOTS = 256
ENCODER_BATCH = 16
RING = 64
"""Windows that a pod's encoder can be ahead of its decoder."""
NOISE = 0.03
EPOCH = 1_700_000_000.0
"""Unix time of a trace's first second."""


@dataclass(slots=True)
class Fleet:
    """Replicas of one stage, or pods. ready: take work. arriving: how many become ready, by second."""

    target: int
    ready: int
    arriving: Counter[int] = field(default_factory=Counter)

    @property
    def pending(self) -> int:
        return self.arriving.total()

    def scale(self, target: int, now: int, cold_start_s: float, sigma: float, rng: np.random.Generator) -> None:
        """Orders what is missing; sends away first what is not ready yet, last ordered first."""
        if target > self.target:
            self.order(target - self.target, now, cold_start_s, sigma, rng)
        surplus = self.target - target
        for at in sorted(self.arriving, reverse=True):
            if surplus <= 0:
                break
            gone = min(surplus, self.arriving[at])
            self.arriving[at] -= gone
            surplus -= gone
        self.arriving += Counter()
        self.ready -= max(0, surplus)
        self.target = target

    def order(self, count: int, now: int, cold_start_s: float, sigma: float, rng: np.random.Generator) -> None:
        factors = np.exp(rng.normal(0, sigma, count)) if sigma > 0 else np.ones(count)
        for at, number in Counter((now + np.ceil(cold_start_s * factors)).astype(int).tolist()).items():
            self.arriving[at] += number

    def arrive(self, now: int) -> None:
        self.ready += self.arriving.pop(now, 0)


class World:
    """gpus: scale of the trace. Steps must be taken in order: ``second``, then what the policy wants, ``scale``."""

    def __init__(
        self, trace: Trace, *, gpus: float, cold_start_s: float, topology: str = "colocated", work: Work | None = None,
        seed: int = 0,
    ):  # fmt: skip
        self.trace, self.cold_start_s, self.topology = trace, cold_start_s, topology
        self.work = work or Work()
        self.rng = np.random.default_rng([seed, *trace.name.encode(), int(gpus * 1000), int(cold_start_s)])
        self.intensity: Array = trace.expected * gpus * self.work.rate
        self.arrived: Array = arrivals(self.intensity, self.rng)
        self._arrived: list[float] = self.arrived.tolist()
        self._missing: list[float] = trace.missing.tolist()
        self.done: Array = np.zeros(trace.seconds)
        self._noise = self.rng.normal(0, NOISE, trace.seconds).tolist()
        self.units: Mapping[str, Fleet] = {
            name: self._starting_fleet(rate) for name, rate in self.rates().items()
        }  # fmt: skip
        self.queues = dict.fromkeys(STAGES, 0.0)
        self.flows = dict.fromkeys(STAGES, 0.0)
        self.budgets = dict.fromkeys(STAGES, BUDGET_FLOOR)
        self.utilization = dict.fromkeys(STAGES, 0.0)
        self._held = dict.fromkeys(STAGES, 0.0)
        self._pod = 0.0
        self._owed = 0.0
        self.now = -1

    def rates(self) -> dict[str, float]:
        """Windows a second of a replica, by unit: ``pods``, or the stages."""
        if self.topology == "colocated":
            return {"pods": self.work.rate}
        return {stage: self.work.split_rate(stage) for stage in STAGES}

    def gpus_held(self, unit: str) -> float:
        return 1.0 if unit == "pods" else SPLIT_GPUS[unit]

    def fleet(self, stage: str) -> Fleet:
        return self.units["pods" if self.topology == "colocated" else stage]

    def _starting_fleet(self, rate: float) -> Fleet:
        count = max(1, math.ceil(float(self.intensity[0]) / rate / START_UTILIZATION))
        return Fleet(count, count)

    # A second of work

    def second(self) -> None:
        self.now += 1
        for fleet in self.units.values():
            fleet.arrive(self.now)
        lost = self._deaths()
        came = self._arrived[self.now] + lost
        costs = {stage: self.work.costs[stage] / efficiency(self.budgets[stage]) for stage in STAGES}
        gave = self._shared(came, costs) if self.topology == "colocated" else self._apart(costs)
        inflow = came
        for stage in STAGES:
            waiting = self.queues[stage] + inflow
            flow = min(waiting, gave[stage] / costs[stage])
            self.queues[stage] = waiting - flow if waiting - flow > 1e-9 else 0.0
            self.flows[stage] = inflow = flow
            budget = self.budgets[stage]
            grown = budget * BUDGET_UP if self.queues[stage] > 0 else budget * BUDGET_DOWN
            self.budgets[stage] = min(1.0, max(BUDGET_FLOOR, grown))
        self._measure()
        # What died with a replica came out once already, and comes again.
        self._owed += lost
        repeated = min(self._owed, inflow)
        self._owed -= repeated
        self.done[self.now] = inflow - repeated

    def _deaths(self) -> float:
        """Replicas die; their successors are ordered. Gives the windows that ran on them."""
        trace, lost = self.trace, 0.0
        if trace.life_s is None and trace.mass_death is None:
            return 0.0
        for unit, fleet in self.units.items():
            dead = int(self.rng.binomial(fleet.ready, 1 / trace.life_s)) if trace.life_s else 0
            if trace.mass_death is not None and self.now == trace.mass_death[0]:
                dead = max(dead, math.ceil(trace.mass_death[1] * fleet.ready))
            if dead:
                share = dead / fleet.ready
                fleet.ready -= dead
                fleet.order(dead, self.now, self.cold_start_s, trace.cold_sigma, self.rng)
                lost += share * self.flows["decoder" if unit == "pods" else unit]
        return lost

    def _shared(self, came: float, costs: Mapping[str, float]) -> dict[str, float]:
        """GPU seconds for each stage, of pods' GPUs."""
        pods = float(self.units["pods"].ready)
        cost = costs["encoder"] + costs["decoder"]
        features = min((self.queues["features"] + came) * costs["features"], pods / 3)
        left = pods - features
        ready, queued = self.queues["encoder"] + features / costs["features"], self.queues["decoder"]
        # With nothing left over: all that is encoded is decoded; or equal slices, until the ring is full.
        through = (left - queued * costs["decoder"]) / cost
        ahead = min(
            left / 2, (RING * pods - queued + left / costs["decoder"]) / cost * costs["decoder"] * costs["encoder"]
        )
        encoder = min(ready * costs["encoder"], max(0.0, through * costs["encoder"], ahead))
        return {"features": features, "encoder": encoder, "decoder": left - encoder}

    def _apart(self, costs: Mapping[str, float]) -> dict[str, float]:
        return {stage: self.units[stage].ready * SPLIT_GPUS[stage] for stage in costs}

    # What can be measured of it

    def _measure(self) -> None:
        """utilization: of its GPUs' saturation point, by stage, without noise. held: share of its GPU's time that the
        stage's batches held; the decoder always has some window in its slots, so what the others leave is its."""
        shared = self.topology == "colocated"
        for stage in STAGES:
            ready = self.fleet(stage).ready
            gpus = ready * (1.0 if shared else SPLIT_GPUS[stage])
            self.utilization[stage] = min(1.0, self.flows[stage] * self.work.costs[stage] / gpus) if ready else 0.0
            self._held[stage] = min(1.0, self.utilization[stage] / efficiency(self.budgets[stage]))
        if self.flows["decoder"] > 0:
            others = self._held["features"] + self._held["encoder"] if shared else 0.0
            self._held["decoder"] = max(self.utilization["decoder"], 1 - others)
        self._pod = min(1.0, sum(self.utilization.values()))

    def pod_utilization(self) -> float:
        return self._pod

    def running(self, stage: str) -> float:
        """Windows in its batches or slots, of all its replicas."""
        fleet = self.fleet(stage)
        used = self._pod if self.topology == "colocated" else self.utilization[stage]
        if stage == "decoder":
            return fleet.ready * SLOTS * fill(used)
        return fleet.ready * ENCODER_BATCH * self.utilization[stage]

    def waiting(self) -> float:
        return sum(self.queues.values())

    def reading(self, stage: str) -> ReplicaReading:
        """A replica's, the mean of all."""
        fleet, queue, flow = self.fleet(stage), self.queues[stage], self.flows[stage]
        sm, dram = self._device(stage)
        used = self._pod if self.topology == "colocated" else self.utilization[stage]
        return ReplicaReading(
            at=EPOCH + self.now,
            busy=self._held[stage],
            gpu_share=self._held[stage],
            sm_utilization=sm,
            dram_utilization=dram,
            saturation=SATURATION[stage],
            fill=fill(used) if stage == "decoder" else used,
            queued_windows=round(queue / fleet.ready),
            queued_s=queue * WINDOW_S / fleet.ready,
            oldest_wait_s=self._oldest_wait_s(stage),
            running_windows=round(self.running(stage) / fleet.ready),
            rate=flow * WINDOW_S / fleet.ready / self._held[stage] if flow > 0 else None,
            budget_at_bound=self.budgets[stage] >= 1,
            done_s=flow * WINDOW_S / fleet.ready,
        )

    def _device(self, stage: str) -> tuple[float, float]:
        """SM and DRAM utilization of the stage's GPUs, as measured."""
        if self.topology == "colocated":
            used, work = self._pod, sum(SATURATION[s] * self.utilization[s] for s in STAGES)
        else:
            used = self.utilization[stage]
            work = SATURATION[stage] * used
        noise = 1 + self._noise[self.now] / math.sqrt(max(1, self.fleet(stage).ready))
        return min(1.0, work * noise), 0.7 * used

    def _oldest_wait_s(self, stage: str) -> float:
        return self.queues[stage] / max(self.flows[stage], 1e-9)

    def signals(self) -> Signals:
        """Of each replica by itself."""
        lost = self._missing[self.now]
        stages = {}
        for stage in STAGES:
            fleet = self.fleet(stage)
            known = [i for i in range(fleet.ready) if lost == 0 or self.rng.random() >= lost]
            one = self.reading(stage) if known else None
            stages[stage] = StageSignals(
                fleet.target,
                fleet.ready,
                fleet.pending,
                self.gpus_held("pods") / len(STAGES) if self.topology == "colocated" else SPLIT_GPUS[stage],
                {f"{stage}-{i}": one for i in known if one is not None},
                {f"{stage}-{i}": str(i) for i in known} if self.topology == "colocated" else {},
            )
        return Signals(stages, self._callers())

    def loads(self) -> tuple[dict[str, StageLoad], dict[str, float]]:
        """What ``load.loads`` makes of ``signals``, without a reading for each replica."""
        lost = self._missing[self.now]
        shared = self.topology == "colocated"
        held = sum(self._held.values())
        stages, device = {}, {}
        for stage in STAGES:
            fleet, flow, queue = self.fleet(stage), self.flows[stage], self.queues[stage]
            fresh = int(self.rng.binomial(fleet.ready, 1 - lost)) if lost > 0 else fleet.ready
            seen = fresh > 0
            sm = own = dram = 0.0
            if seen:
                sm, dram = self._device(stage)
                part = self._held[stage] / held if shared and held > 0 else 1.0
                own = device[stage] = min(1.0, sm * part / SATURATION[stage])
                if stage == "decoder":
                    own = min(1.0, max(own, dram * part, fill(self._pod if shared else self.utilization[stage])))
            else:
                device[stage] = 0.0
            done = flow * WINDOW_S if seen else 0.0
            queued = queue * WINDOW_S if seen or not fleet.ready else 0.0
            stages[stage] = StageLoad(
                target=fleet.target,
                ready=fleet.ready,
                pending=fleet.pending,
                gpus=1 / len(STAGES) if shared else SPLIT_GPUS[stage],
                fresh=fresh,
                at=EPOCH + self.now if seen else None,
                throughput=done,
                utilization=own,
                rate=done / fleet.ready / own if own >= LEAST_UTILIZATION and done > 0 else None,
                queued_s=queued,
                inlet_s=queued,
                oldest_wait_s=self._oldest_wait_s(stage) if seen else float(queued > 0),
                at_bound=float(seen and self.budgets[stage] >= 1),
                on_gpu=seen,
            )
        return stages, device

    def _callers(self) -> dict[str, CallerReading]:
        """Windows wait at the callers where no replica is ready."""
        if all(fleet.ready for fleet in self.units.values()):
            return {}
        held = {stage: 0.0 if self.fleet(stage).ready else self.queues[stage] for stage in STAGES}
        values: dict[str, Any] = {}
        for stage, windows in held.items():
            values |= {f"{stage}_windows": round(windows), f"{stage}_s": windows * WINDOW_S}
            values |= {f"{stage}_oldest_wait_s": 1.0 if windows else 0.0}
        return {"api": CallerReading(at=EPOCH + self.now, active=round(sum(held.values())), **values)}

    # What the policy does

    def scale(self, targets: Mapping[str, int]) -> None:
        """targets: by unit."""
        for unit, target in targets.items():
            fleet = self.units[unit]
            if target != fleet.target:
                fleet.scale(target, self.now, self.cold_start_s, self.trace.cold_sigma, self.rng)


def efficiency(budget: float) -> float:
    """Throughput at a share of the budget's bound, of that at the bound."""
    return 1.1 * budget / (budget + 0.1)


def fill(used: float) -> float:
    return 0.25 * used / (1 - 0.75 * used)
