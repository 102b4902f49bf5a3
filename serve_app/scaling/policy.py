"""How many replicas each stage should have, and why: one decision for the whole application (pure).

``decide(config, state, signals, now)`` gives the next state and the decision. It is called once a second or more often;
time passes only through ``now`` and the readings' own times, so recorded signals replayed through it give the same
decisions. docs/scaling.md tells the rules in words; this is their order for each unit (a stage, or the pods):

1. Without fresh readings of most replicas nothing changes.
2. The demand is what arrived, by the callers; where they have not told, what the first stage did and by how much its
   queue grew. Known before a GPU notices.
3. Capacity is throughput over utilization, at the stage's own saturation point.
4. More replicas: demand times headroom over capacity; or the queue, where it will not be gone before a new replica
   could come. Batches grow first: replicas only come where budgets are at their bound or latency is at risk.
5. Fewer: only if they would have sufficed for all of the hold time, and suffice in thought with the queue there is.
6. Limits, then the budget of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from serve_app.scaling.budget import Claim, share
from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.forecast import BURST, Choice, Demand, Rehearsal, holds
from serve_app.scaling.load import Signals, StageLoad, loads, pods
from serve_app.scaling.readings import STAGES, Stage

PODS = "pods"
"""The unit of the colocated topology."""

Reason = Literal[
    "steady",  # as many as are needed
    "demand",  # more: what arrives, with headroom
    "burst",  # more: what arrives has jumped
    "queue",  # more: what waits
    "fewer",  # fewer suffice
    "hold",  # fewer might suffice, but not yet surely
    "batches_first",  # batches can still grow
    "stale",  # too few fresh readings: nothing changes
    "starting",  # no replica is ready yet
    "measuring",  # nothing is known of a replica's rate yet
    "wake",  # work came while there was no replica
    "idle",  # no work for long
    "limit",  # min_replicas or max_replicas
    "gpu_budget",
]

READING_S = 0.9
"""Readings come once a second; demand is taken from two that lie at least this far apart."""
LONG_GAP_S = 10.0
"""After a longer time without readings the past is no measure of what arrived meanwhile."""
RATE_S = 60.0
"""Time constant of a replica's rate, once known."""
RATE_UTILIZATION = 0.3
"""From this utilization on, throughput over utilization is trusted to correct the rate."""
SEEN = 0.5
"""With fresh readings of a smaller share of replicas nothing changes."""
SEEN_TO_SHRINK = 0.9
PENDING_TO_SHRINK = 0.1
"""While a larger share is still starting, no replica goes."""
AT_BOUND = 0.5
"""Budgets are at their bound when those of this share of the replicas are."""
SATURATED = 0.9
"""Above this utilization latency is at risk, whatever batches do."""
BAND, LEAST_BAND, MOST_BAND = 3.0, 0.005, 0.05
"""Replicas that are missing or to spare count from this share of all on: three standard deviations of the noise in the
demand, within bounds."""
FIRST_BAND = 0.1
"""The same for headroom that nothing has been learned about yet."""
DOWN_STEP = 2.0
"""Fewer replicas when, with one band to spare, two bands of them can go."""
QUIET = 0.25
"""No replica goes while more waits than is done in this share of the objective."""
DRAIN = 0.5
"""A queue is to be gone this share of a cold start after new replicas have come."""
LEARN_S = 3600.0
REVIEW_S = 600.0
"""Headroom is reviewed this often; it falls below what ``sm_utilization`` says after an hour at the earliest."""
AIM = 0.75
"""Of the 1 % that may be late, what headroom is chosen for: the real fleet is later than the one in thought."""
LATE_SHARE = 0.01
LEARNED_FOR = ("topology", "cold_start_s", "down_hold_s", "objective_wait_s")
"""Settings that a change of makes the policy begin anew."""


@dataclass(frozen=True, slots=True)
class UnitState:
    """What is remembered of a unit.

    at, inlet_s: time of the last reading that was used, and what then waited for the first stage.
    since: time of the first. rate: seconds of audio that a replica does in a second at its saturation point.
    choice: headroom and hold time in force; learned: they come from the unit's own past. reviewed_at: when last.
    panic_until: no replica goes before. more_since, idle_since: since when more are wanted, and no work has come.
    """

    at: float | None = None
    inlet_s: float = 0.0
    since: float | None = None
    demand: Demand = field(default_factory=Demand)
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    rate: float | None = None
    choice: Choice | None = None
    learned: bool = False
    reviewed_at: float | None = None
    panic_until: float | None = None
    more_since: float | None = None
    idle_since: float | None = None

    def plan(self, now: float) -> float:
        """The demand that is provided for, without headroom."""
        return _plan(self.demand, self.panic_until, now)


@dataclass(frozen=True, slots=True)
class State:
    """What the policy remembers between decisions, by unit. Plain values: ``to_dict`` gives what JSON takes."""

    units: Mapping[str, UnitState] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        dumped: dict[str, Any] = _STATE.dump_python(self, mode="json")
        return dumped

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> State:
        """Raises pydantic.ValidationError where these are not a state's."""
        return _STATE.validate_python(dict(values))


_STATE = TypeAdapter(State)


def carried(state: State, before: ScalingSettings, after: ScalingSettings) -> State:
    """What of a state holds when the configuration changes from one to the other.

    What was learned, was learned for a topology, a cold start, a hold time and an objective. A headroom that was not
    learned comes from ``sm_utilization``.
    """
    if any(getattr(before, name) != getattr(after, name) for name in LEARNED_FOR):
        return State()
    if before.sm_utilization == after.sm_utilization:
        return state
    return State(
        {
            name: unit if unit.learned else replace(unit, choice=None, reviewed_at=None)
            for name, unit in state.units.items()
        }
    )


@dataclass(frozen=True, slots=True)
class UnitDecision:
    """target: replicas. words: the reason, for a person. demand, rate, utilization: what it was decided from, in
    seconds of audio a second (of the unit, of one replica) and 0 to 1."""

    target: int
    reason: Reason
    words: str
    demand: float = 0.0
    rate: float | None = None
    utilization: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """targets: replicas by stage. units: why, by stage, or for ``pods``."""

    targets: Mapping[Stage, int]
    units: Mapping[str, UnitDecision]


def decide(config: ScalingSettings, state: State, signals: Signals, now: float) -> tuple[State, Decision]:
    """now: Unix time, as are the readings'. Raises ValueError where there is no stage, or an unknown one."""
    return decide_from(config, state, *loads(signals, now, config.stale_after_s), now)


def decide_from(
    config: ScalingSettings,
    state: State,
    stages: Mapping[Stage, StageLoad],
    device: Mapping[Stage, float],
    now: float,
) -> tuple[State, Decision]:
    """As ``decide``, from ``load.loads``."""
    unknown = set(stages) - set(STAGES)
    if unknown or not stages:
        raise ValueError(f"stages are {', '.join(STAGES)}; signals came of {', '.join(sorted(stages)) or 'none'}")
    units = {PODS: pods(stages, device)} if config.topology == "colocated" else _chained(stages)
    states: dict[str, UnitState] = {}
    decisions: dict[str, UnitDecision] = {}
    known = 0.0
    for name, load in units.items():
        before = state.units.get(name, UnitState())
        after, arrived = _observe(config, name, before, load, known, now)
        # What the first stage takes will come to the others: they need not wait until it does.
        known = max(known, arrived)
        states[name], decisions[name] = _decide_unit(config, name, after, load, now)
    decisions = _within_budget(config, units, states, decisions)
    if config.topology == "colocated":
        targets = dict.fromkeys(stages, decisions[PODS].target)
    else:
        targets = {stage: decisions[stage].target for stage in stages}
    return State(states), Decision(targets, decisions)


def _chained(stages: Mapping[Stage, StageLoad]) -> dict[str, StageLoad]:
    """Each stage by itself, with what waits before the stages before it: that will come."""
    chained, before = {}, 0.0
    for stage in STAGES:
        if (load := stages.get(stage)) is not None:
            chained[stage] = replace(load, queued_s=load.queued_s + before)
            before += load.queued_s
    return chained


def _observe(
    config: ScalingSettings, name: str, state: UnitState, load: StageLoad, known: float, now: float
) -> tuple[UnitState, float]:
    """The state with the newest readings in it, and the seconds of audio that arrived in a second.

    known: what arrived at the stages before.
    """
    enough = load.ready > 0 and load.fresh >= SEEN * load.ready
    if not enough or load.at is None or (state.at is not None and load.at - state.at < READING_S):
        return state, state.demand.last or 0.0
    rate = _rate(state.rate, load)
    gap = state.at is None or load.at - state.at > LONG_GAP_S
    dt = 1.0 if state.at is None or gap else load.at - state.at
    if load.arrived is not None:
        came = load.arrived
    else:
        # after a gap the queue may have grown for long, so only what is done tells
        came = load.throughput + (0.0 if gap else (load.inlet_s - state.inlet_s) / dt)
    arrived = max(known, came, 0.0)
    demand, jump = state.demand.step(arrived, dt)
    panic_until = now + config.panic_window_s if jump >= BURST else state.panic_until
    rehearsal = state.rehearsal.step(
        demand=arrived,
        plan=_plan(demand, panic_until, now),
        rate=rate,
        at=load.at,
        dt=dt,
        cold_start_s=config.cold_start_s,
        hold_s=config.down_hold_s,
        objective_s=config.objective_wait_s,
        least=max(1, config.limits(name).min_replicas),
    )
    after = UnitState(
        at=load.at,
        inlet_s=load.inlet_s,
        since=load.at if state.since is None else state.since,
        demand=demand,
        rehearsal=rehearsal,
        rate=rate,
        choice=state.choice,
        learned=state.learned,
        reviewed_at=state.reviewed_at,
        panic_until=panic_until,
        more_since=state.more_since,
        idle_since=None if arrived > 0 or load.queued_s > 0 else state.idle_since or now,
    )
    return _review(config, after, now), arrived


def _plan(demand: Demand, panic_until: float | None, now: float) -> float:
    panic = panic_until is not None and now < panic_until
    return max(demand.level, demand.fast) if panic else demand.level


def _rate(before: float | None, load: StageLoad) -> float | None:
    if before is None:
        # What is done is smoothed and so too little at first; batches measure too little while they are small.
        return max((rate for rate in (load.rate, load.own_rate) if rate is not None), default=None)
    if load.rate is None or load.utilization < RATE_UTILIZATION:
        return before
    return before + (1 - math.exp(-1 / RATE_S)) * (load.rate - before)


def _review(config: ScalingSettings, state: UnitState, now: float) -> UnitState:
    """Takes the headroom and the hold time that the past asks for."""
    times = holds(config.cold_start_s, config.down_hold_s)
    if state.choice is None or state.reviewed_at is None:
        first = Choice(1 / config.sm_utilization, times[len(times) // 2])
        return replace(state, choice=first, reviewed_at=now)
    if now - state.reviewed_at < REVIEW_S:
        return state
    before = state.choice
    state = replace(state, reviewed_at=now)
    best = state.rehearsal.best(times, AIM * LATE_SHARE)
    if best is None:
        return state
    if state.rehearsal.seconds >= LEARN_S or best.headroom > before.headroom:
        return replace(state, choice=best, learned=True)
    return state


def _decide_unit(
    config: ScalingSettings, name: str, state: UnitState, load: StageLoad, now: float
) -> tuple[UnitState, UnitDecision]:
    limits = config.limits(name)
    zero = limits.min_replicas == 0 and config.zero_after_s is not None
    least = max(1, limits.min_replicas)
    have = load.target

    def say(target: int, reason: Reason, words: str) -> UnitDecision:
        floor = 0 if zero and (reason == "idle" or have == 0 == target) else least
        bounded = min(max(target, floor), limits.max_replicas)
        if bounded != target:
            words = f"{words}; but the limits are {floor} and {limits.max_replicas}"
            reason = "limit"
        return UnitDecision(bounded, reason, words, state.plan(now), state.rate, load.utilization)

    if have == 0 and load.ready == 0 and load.pending == 0:
        if load.queued_s > 0:
            state = replace(state, idle_since=None)
            return state, say(least, "wake", f"{load.queued_s:.0f} s of audio wait and there is no replica")
        return state, say(0, "idle", "no work")
    if load.ready == 0:
        return state, say(have, "starting", f"none of {load.pending} is ready yet")
    if load.fresh < SEEN * load.ready:
        return state, say(have, "stale", f"only {load.fresh} of {load.ready} replicas have been heard of lately")
    if zero and state.idle_since is not None and config.zero_after_s is not None:
        idle = now - state.idle_since
        if idle >= config.zero_after_s:
            return state, say(0, "idle", f"no work for {idle:.0f} s")
    if state.rate is None or state.choice is None:
        return state, say(have, "measuring", "no replica has told yet how much it does")
    return _compare(config, state, load, state.rate, state.choice, now, say)


def _compare(
    config: ScalingSettings,
    state: UnitState,
    load: StageLoad,
    rate: float,
    choice: Choice,
    now: float,
    say: Any,
) -> tuple[UnitState, UnitDecision]:
    """More, fewer or as many."""
    have, plan = load.target, state.plan(now)
    times = holds(config.cold_start_s, config.down_hold_s)
    top = state.rehearsal.tops[times.index(choice.hold_s)].extreme
    needed = choice.headroom * plan / rate
    band = min(max(BAND * state.demand.doubt, LEAST_BAND), MOST_BAND)
    doing = f"{plan:.0f} s of audio come in a second and a replica does {rate:.0f}"
    waiting = f"{load.queued_s:.0f} s of audio wait"

    wait_s = max(load.oldest_wait_s, load.queued_s / (load.ready * rate))
    late = wait_s > config.objective_wait_s / 2
    at_bound = load.at_bound >= AT_BOUND
    for_queue = _for_queue(config, load, plan, rate)

    more, reason, words = have, "steady", ""
    gated = False
    if needed > have * (1 + (band if state.learned else FIRST_BAND)):
        if state.learned or at_bound or late or plan > SATURATED * have * rate:
            more = math.ceil(needed - 1e-9)
            panic = state.panic_until is not None and now < state.panic_until
            reason = "burst" if panic else "demand"
            words = f"{doing}; with headroom {choice.headroom:.2f} that takes {more}"
        else:
            gated = True
    if for_queue > max(more, have):
        if at_bound or late:
            more, reason = for_queue, "queue"
            words = f"{waiting}, {wait_s:.1f} s, and {doing}: {more} would work it off in time"
        else:
            gated = True
    if more > have:
        since = now if state.more_since is None else state.more_since
        state = replace(state, more_since=since)
        # A burst stands out of the noise by itself.
        if reason == "burst" or now - since >= config.up_hold_s:
            return state, say(more, reason, words)
        return state, say(have, "hold", f"{words}, but for {now - since:.1f} s only")
    if state.more_since is not None:
        state = replace(state, more_since=None)
    if gated:
        return state, say(have, "batches_first", f"{doing}, utilization {load.utilization:.0%}: batches can still grow")

    # What was needed before the first reading is not known.
    seen_s = now - (state.since or now)
    fewer = have if seen_s < choice.hold_s else max(1, math.ceil(choice.headroom * top / rate * (1 + band) - 1e-9))
    steady = f"{doing}; utilization {load.utilization:.0%}"
    if fewer >= have or have - fewer < DOWN_STEP * band * have:
        return state, say(have, "steady", steady)
    if (blocked := _may_not_shrink(config, state, load, now)) is not None:
        return state, say(have, "hold", f"{fewer} would do, but {blocked}")
    if not suffices(fewer, rate=rate, demand=top, queued_s=load.queued_s, config=config):
        return state, say(have, "hold", f"{fewer} would do, but {waiting}")
    return state, say(
        fewer, "fewer", f"no more than {top:.0f} s of audio came in a second for {choice.hold_s:.0f} s: {fewer} suffice"
    )


def _for_queue(config: ScalingSettings, load: StageLoad, plan: float, rate: float) -> int:
    """Replicas that work off the queue in time; 0 where those there are will, before another one could come.

    Replicas that are starting count: the number is of all.
    """
    allowed = config.objective_wait_s / 2 * load.ready * rate
    spare = load.ready * rate - plan
    if load.queued_s <= allowed or spare * config.cold_start_s >= load.queued_s:
        return 0
    drain_s = max(config.objective_wait_s, DRAIN * config.cold_start_s)
    return math.ceil((plan + (load.queued_s - allowed) / drain_s) / rate - 1e-9)


def _may_not_shrink(config: ScalingSettings, state: UnitState, load: StageLoad, now: float) -> str | None:
    """Why no replica may go now."""
    if load.fresh < SEEN_TO_SHRINK * load.ready:
        return f"only {load.fresh} of {load.ready} replicas have been heard of lately"
    if load.pending > PENDING_TO_SHRINK * load.target:
        return f"{load.pending} are still starting"
    if state.panic_until is not None and now < state.panic_until:
        return f"a burst came {now - state.panic_until + config.panic_window_s:.0f} s ago"
    return None


def suffices(count: int, *, rate: float, demand: float, queued_s: float, config: ScalingSettings) -> bool:
    """In thought: would so many replicas carry the demand, and the queue there is, within the objective?"""
    capacity = count * rate
    return capacity >= demand and queued_s <= QUIET * config.objective_wait_s * capacity


def _within_budget(
    config: ScalingSettings,
    units: Mapping[str, StageLoad],
    states: Mapping[str, UnitState],
    decisions: dict[str, UnitDecision],
) -> dict[str, UnitDecision]:
    if config.gpu_budget is None:
        return decisions
    claims = {
        # A stage whose rate is unknown is taken to pass as much as it wants replicas.
        name: Claim(
            least=min(max(1, config.limits(name).min_replicas), decision.target),
            wanted=decision.target,
            gpus=units[name].gpus,
            rate=states[name].rate or 1.0,
        )
        for name, decision in decisions.items()
    }
    if any(state.rate is None for state in states.values()):
        claims = {name: replace(claim, rate=1 / max(1, claim.wanted)) for name, claim in claims.items()}
    given = share(claims, config.gpu_budget)
    return {
        name: decision
        if given[name] == decision.target
        else replace(
            decision,
            target=given[name],
            reason="gpu_budget",
            words=f"{decision.words}; but there are {config.gpu_budget:g} GPUs for all stages",
        )
        for name, decision in decisions.items()
    }
