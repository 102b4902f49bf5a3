"""Pictures of what was played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from loadtest.simulate.play import Course
from loadtest.simulate.scenarios import COST_GOAL, LATE_SHARE, OBJECTIVE_S, clairvoyant
from loadtest.simulate.world import World


def course(path: Path, world: World, course: Course, title: str) -> None:
    """The load, the replicas and the waits of one run, second by second."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 5), sharex=True, height_ratios=(3, 1))
    for unit, rate in world.rates().items():
        optimum, _ = clairvoyant(world.intensity, rate, world.cold_start_s)
        hours = [second / 3600 for second in range(world.trace.seconds)]
        prefix = "" if unit == "pods" else f"{unit}: "
        top.plot(hours, course.ready[unit], lw=0.8, label=f"{prefix}ready")
        top.plot(hours, course.targets[unit], lw=0.6, alpha=0.6, label=f"{prefix}wanted")
        top.plot(hours, optimum, lw=0.8, ls="--", label=f"{prefix}clairvoyant optimum")
        top.plot(hours, world.intensity / rate, lw=0.8, color="black", alpha=0.5, label=f"{prefix}load")
    top.set_ylabel("replicas")
    top.set_ylim(bottom=0)
    top.legend(loc="upper left", fontsize=7, ncols=2)
    top.set_title(title, fontsize=10)
    bottom.plot(hours, course.waits, lw=0.8)
    bottom.axhline(OBJECTIVE_S, color="red", lw=0.6)
    bottom.set_ylabel("wait, s")
    bottom.set_xlabel("hours")
    _write(figure, path)


def fronts(path: Path, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Late work over cost: this project's policy, and the Pareto fronts of the usual ones."""
    figure, axes = plt.subplots(1, len(comparisons), figsize=(5 * len(comparisons), 4), squeeze=False)
    for axis, comparison in zip(axes[0], comparisons, strict=True):
        for name, front in comparison["fronts"].items():
            points = [(p["cost"], 100 * max(p["late_share"], 1e-5)) for p in front]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        ours = comparison["ours"]
        axis.plot(ours["cost"], 100 * max(ours["late_share"], 1e-5), "k*", ms=12, label="this policy, defaults")
        axis.axhline(100 * LATE_SHARE, color="red", lw=0.6)
        axis.axvline(COST_GOAL, color="red", lw=0.6)
        axis.set_yscale("log")
        axis.set_xlim(0.8, 3)
        axis.set_xlabel("GPU hours over the clairvoyant optimum's")
        axis.set_ylabel("late windows, %")
        axis.set_title(
            f"{comparison['trace']}, {comparison['gpus']:g} GPUs, cold start {comparison['cold_start_s']:g} s",
            fontsize=10,
        )
        axis.legend(fontsize=7)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
