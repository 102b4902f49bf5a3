"""Two ways to batch, each a loop that drives a machine over the same traffic and returns every window's latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.batching.machines import Costs, Machine
from loadtest.batching.windows import Window
from serve_app.batching.budget import PERIOD_S, AdaptiveBudget
from serve_app.batching.feedback import Bounds, FeedbackSettings
from serve_app.batching.planner import Waiting, plan

NO_DEADLINE = math.inf


class Strategy(Protocol):
    def run(self, machine: Machine, windows: Sequence[Window], give_up_s: float) -> list[float]:
        """The windows' latencies, from arrival to text, in their order; infinite for those not done ``give_up_s`` after
        the last arrival."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A batch leaves when it has ``size`` windows or its first has waited ``wait_s``, and the device is free. It is
    decoded until its longest window ends, and then all of it is done: what servers do that hand a model a batch. (A
    batch takes its windows when the device comes free, not before: some servers do worse.)"""

    size: int
    wait_s: float

    def __str__(self) -> str:
        return f"fixed, {self.size} windows, wait {self.wait_s:g} s"

    def run(self, machine: Machine, windows: Sequence[Window], give_up_s: float) -> list[float]:
        latencies = [math.inf] * len(windows)
        machine.begin()
        first, end = 0, windows[-1].arrived + give_up_s
        while first < len(windows) and machine.now() < end:
            leaves = windows[first].arrived + self.wait_s
            if first + self.size <= len(windows):
                leaves = min(leaves, windows[first + self.size - 1].arrived)
            machine.sleep_until(leaves)
            now, last = machine.now(), first
            while last < min(first + self.size, len(windows)) and windows[last].arrived <= now:
                last += 1
            batch = range(first, last)
            longest = max(windows[i].tokens for i in batch)
            machine.encode(batch, [longest] * len(batch))
            machine.drain()
            done = machine.now()
            for i in batch:
                latencies[i] = done - windows[i].arrived
            first = last
        return latencies


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The product's way: the planner cuts batches for the encoder, windows are decoded in slots that are refilled
    between steps, and feedback moves both budgets. All on one device and in one thread, where the product has a process
    for each stage.

    costs: the device's, from which its utilization is told: the work of the last second over what a device in the best
    batches would have done. objective_s: of latency.
    """

    costs: Costs
    objective_s: float
    encoder_start: int
    settings: FeedbackSettings

    def __str__(self) -> str:
        return "adaptive" if self.settings.enabled else "adaptive, without feedback"

    def _budgets(self, slots: int) -> tuple[AdaptiveBudget, AdaptiveBudget]:
        settings = self.settings.model_copy(update={"latency_objective_s": self.objective_s})
        encoder = Bounds(
            least=1,
            most=self.costs.most_encoded,
            quantum=1,
            objective_s=settings.objective_s("encoder", on_gpu=True),
            most_wait_s=settings.max_wait_s,
        )
        decoder = Bounds(
            least=1, most=slots, quantum=1, objective_s=settings.objective_s("decoder", on_gpu=True), batches=1
        )
        return (
            AdaptiveBudget(settings, encoder, start=self.encoder_start, now=0.0),
            AdaptiveBudget(settings, decoder, start=slots, now=0.0),
        )

    def run(self, machine: Machine, windows: Sequence[Window], give_up_s: float) -> list[float]:
        encoder, decoder = self._budgets(machine.slots)
        latencies = [math.inf] * len(windows)
        waiting: list[Waiting] = []
        encoding: list[int] = []  # numbers of windows whose encoding may not have ended
        entered = [0.0] * len(windows)
        machine.begin()
        coming, end = 0, windows[-1].arrived + give_up_s
        observed, done_s = 0.0, 0.0  # done: the work since then, as the device would do it at its best
        while (coming < len(windows) or waiting or machine.active) and machine.now() < end:
            now = machine.now()
            while coming < len(windows) and windows[coming].arrived <= now:
                waiting.append(Waiting(str(coming), 1.0, windows[coming].arrived, NO_DEADLINE))
                coming += 1

            oldest = waiting[0].arrived if waiting else now
            room = int(decoder.budget) - machine.active
            leaves_at = encoder.leaves_at((w.cost for w in waiting), oldest) if waiting else math.inf
            if room > 0 and now >= leaves_at:
                batch = plan(waiting, budget=min(encoder.budget, room))
                taken = {w.window_id for w in batch}
                waiting = [w for w in waiting if w.window_id not in taken]
                numbers = [int(w.window_id) for w in batch]
                machine.encode(numbers, [windows[i].tokens for i in numbers])
                encoding += numbers
                done_s += len(batch) * self.costs.encoder_best
                for i in numbers:
                    entered[i] = now
            elif not machine.active:
                following = windows[coming].arrived if coming < len(windows) else math.inf
                machine.sleep_until(min(following, leaves_at))

            if machine.active:
                active = machine.active
                ended = machine.step()
                began, now = now, machine.now()
                decoder.ran(active, now - began)  # encoding holds the slots too
                done_s += active * self.costs.step_best
                for i in ended:
                    latencies[i] = now - windows[i].arrived
                    decoder.ended(arrived=windows[i].arrived, began=entered[i], at=now)
            for count, seconds in machine.encodings():
                encoder.ran(count, seconds)
                for i in encoding[:count]:
                    arrived = windows[i].arrived
                    encoder.ended(arrived=arrived, began=entered[i], at=entered[i] + seconds)
                del encoding[:count]
            now = machine.now()
            if (span := now - observed) >= PERIOD_S:
                oldest = waiting[0].arrived if waiting else now
                for budget in (encoder, decoder):
                    costs = (w.cost for w in waiting)
                    budget.observe(now, waiting=costs, oldest=oldest, utilization=min(1.0, done_s / span))
                observed, done_s = now, 0.0
        return latencies
