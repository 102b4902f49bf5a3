"""Play traces against the scaling policy::

    python -m loadtest.simulate goals --json docs/benchmarks/simulate.json --plots docs/img
    python -m loadtest.simulate compare --json docs/benchmarks/simulate-compare.json --plots docs/img
    python -m loadtest.simulate bound --json docs/benchmarks/simulate-bound.json

``bound`` says what hindsight could reach (``bound.py``). ``goals`` plays every trace and says which of the goals
below are met; ``compare`` plays the policies that people use today, over all their settings, and says how late they
are at this policy's cost. What is played is defined in ``loadtest/simulate/scenarios.py``. Ends with status 1 where
a goal is missed.

Goals: at a constant load no scale event in the last 80 % of the hour; after a step settled within two cold starts;
no decision to scale down below the safe count; on the diurnal and burst traces at most 1 % late at no more than
1.25 times the clairvoyant optimum's GPU hours; at equal cost fewer late than each usual policy.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import report
from loadtest.simulate import bound, compare, plots, scenarios
from loadtest.simulate.compare import Job
from loadtest.simulate.play import play
from loadtest.simulate.policies import Ours, settings
from loadtest.simulate.world import World

SIZES = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
COMPARED = ("diurnal_6h", "bursts_6h")
SIZE_OF_TRACES = 100.0
"""GPUs at which every trace is played; other sizes play the traces that have a goal."""
SIZED = ("constant", "step", *scenarios.GOAL_TRACES)
PLOTTED = ("diurnal", "bursts", "step", "flash_crowd", "dying_nodes")


def missed(result: Mapping[str, Any]) -> list[str]:
    """Goals that a run of this project's policy misses (pure)."""
    found = []
    name = result["trace"]
    if name == "constant" and result["late_events"] > 0:
        found.append(f"{result['late_events']} scale events in the last 80 %")
    if name == "step" and result["settle_s"] > 2 * result["cold_start_s"]:
        found.append(f"settled after {result['settle_s']:.0f} s")
    if result["unsafe"]:
        found.append(f"{result['unsafe']} decisions below the safe count")
    if name in scenarios.GOAL_TRACES:
        if result["late_share"] > scenarios.LATE_SHARE:
            found.append(f"{result['late_share']:.2%} late")
        if result["cost"] > scenarios.COST_GOAL:
            found.append(f"cost {result['cost']:.3f}")
    return found


def goal_jobs(traces: Sequence[str], sizes: Sequence[float], colds: Sequence[float]) -> list[Job]:
    return [
        Job(name, gpus, cold)
        for name, gpus, cold in itertools.product(traces, sizes, colds)
        if gpus == SIZE_OF_TRACES or name in SIZED or len(sizes) == 1
    ]


def _played(jobs: Sequence[Job], processes: int) -> Iterable[dict[str, Any]]:
    if processes == 1:
        yield from map(compare.run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(compare.run, jobs)


def _goals(options: argparse.Namespace, console: Console) -> int:
    table = Table("trace", "GPUs", "cold start s", "late %", "p99 s", "cost", "events", "settled s", "missed")
    jobs = goal_jobs(options.traces or _goal_traces(), options.gpus or SIZES, options.cold)
    results, count = [], 0
    for result in _played(jobs, options.jobs):
        goals = missed(result)
        count += bool(goals)
        results.append({**result, "missed": goals})
        row = _row(result)
        table.add_row(*row, ", ".join(goals))
        print(*row, *goals, file=sys.stderr, flush=True)
    console.print(table)
    if options.json is not None:
        report.write_json(options.json, {"environment": report.environment(), "runs": results})
    if options.plots is not None:
        for name in PLOTTED:
            if any(job.trace == name for job in jobs):
                _plot(options.plots, name, options.cold[len(options.cold) // 2])
    console.print(f"{len(results) - count} of {len(results)} runs reach all their goals")
    return 1 if count else 0


def _goal_traces() -> Sequence[str]:
    return [name for name in scenarios.TRACES if name not in COMPARED]


def _row(result: Mapping[str, Any]) -> list[str]:
    settled = result["settle_s"]
    return [
        result["trace"],
        f"{result['gpus']:g}",
        f"{result['cold_start_s']:g}",
        f"{100 * result['late_share']:.3f}",
        f"{result['p99_wait_s']:.2f}",
        f"{result['cost']:.3f}",
        str(result["scale_events"]),
        "" if settled is None else f"{settled:.0f}",
    ]


def _plot(folder: Path, name: str, cold: float) -> None:
    world = World(scenarios.trace(name), gpus=SIZE_OF_TRACES, cold_start_s=cold)
    _, course = play(world, Ours(settings(world, SIZE_OF_TRACES)))
    title = f"{name}: load of up to {SIZE_OF_TRACES:g} GPUs, cold start {cold:g} s"
    plots.course(folder / f"simulate-{name}.png", world, course, title)


def _compare(options: argparse.Namespace, console: Console) -> int:
    comparisons = []
    for name, gpus, cold in itertools.product(
        options.traces or COMPARED, options.gpus or (SIZE_OF_TRACES,), options.cold
    ):
        comparison = compare.judged(list(_played(compare.jobs(name, gpus, cold), options.jobs)))
        comparisons.append(comparison)
        ours = comparison["ours"]
        console.print(
            f"{name}, {gpus:g} GPUs, cold start {cold:g} s: {ours['late_share']:.3%} late at cost {ours['cost']:.3f};"
        )
        for policy, late in comparison["late_at_our_cost"].items():
            best = "costs more with all its settings" if late is None else f"{late:.3%} late at that cost or less"
            console.print(f"  {policy}: {best}")
    if options.json is not None:
        report.write_json(options.json, {"environment": report.environment(), "comparisons": comparisons})
    if options.plots is not None:
        plots.fronts(options.plots / "simulate-compare.png", comparisons)
    better = sum(comparison["better"] for comparison in comparisons)
    console.print(f"better than each usual policy in {better} of {len(comparisons)} comparisons")
    return 0 if better == len(comparisons) else 1


def _bound(options: argparse.Namespace, console: Console) -> int:
    found = [
        bound.cheapest(name, gpus, cold)
        for name, gpus, cold in itertools.product(
            options.traces or scenarios.GOAL_TRACES, options.gpus or (SIZE_OF_TRACES,), options.cold
        )
    ]
    for one in found:
        console.print(
            f"{one['trace']}, {one['gpus']:g} GPUs, cold start {one['cold_start_s']:g} s: {one['cost']:.3f}", one
        )
    if options.json is not None:
        report.write_json(options.json, {"environment": report.environment(), "bounds": found})
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("goals", "compare", "bound"))
    parser.add_argument("--traces", nargs="+", choices=scenarios.TRACES, metavar="TRACE", help="only these")
    parser.add_argument("--gpus", nargs="+", type=float, help="fleets, by the load that a trace's 1 stands for")
    parser.add_argument("--cold", nargs="+", type=float, default=list(scenarios.COLD_STARTS_S), help="cold starts, s")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plots", type=Path, help="write pictures to this folder")
    options = parser.parse_args(arguments)
    if min(options.cold) <= 0 or min(options.gpus or [1]) <= 0 or options.jobs < 1:
        parser.error("--cold, --gpus and --jobs are above 0")
    return options


def main() -> int:
    options = parse()
    commands = {"goals": _goals, "compare": _compare, "bound": _bound}
    return commands[options.what](options, report.console())


if __name__ == "__main__":
    raise SystemExit(main())
