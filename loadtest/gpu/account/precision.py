"""The whole engine in FP16 and in FP32 without TF32: throughput and memory."""

from __future__ import annotations

from loadtest.gpu.account.comparison import Comparison, NotMeasured, Setting
from loadtest.gpu.report import alike
from loadtest.gpu.run import Run, run
from loadtest.gpu.worker import Job

GOAL_THROUGHPUT = 3.8
GOAL_MEMORY = 1 / 0.55
"""The account saves 45 %."""

SYSTEMS = {"FP16": "loadtest.gpu.engine:Engine", "FP32": "loadtest.gpu.engine:EngineFloat32"}


def precision(setting: Setting) -> list[Comparison]:
    """Each in a process of its own, so that neither finds the other's memory taken."""
    runs = {
        name: run(
            "",
            name,
            Job(path, setting.dims, (setting.windows,), repeats=2, seconds=setting.seconds, device=setting.device),
        )
        for name, path in SYSTEMS.items()
    }
    return compared_precision(runs, setting.windows)


def compared_precision(runs: dict[str, Run], windows: int) -> list[Comparison]:
    """Of the runs of both precisions (pure)."""
    half, single = (runs[name] for name in SYSTEMS)
    ours, other = half.at(windows), single.at(windows)
    if ours is None or other is None:
        raise NotMeasured("; ".join(f"{r.name}: {r.error or r.left_out or 'no figure'}" for r in (half, single)))
    same = alike(half.sizes, single.sizes)
    what = f"engine in FP16, {windows} windows" + (f", {same:.0%} of the tokens alike" if same is not None else "")
    speed = Comparison("precision", what, "FP32", "RTFx", ours.rtfx, other.rtfx, GOAL_THROUGHPUT, more_is_better=True)
    if ours.memory_gib is None or other.memory_gib is None:
        return [speed]
    memory = Comparison("precision", what, "FP32", "GiB in use", ours.memory_gib, other.memory_gib, GOAL_MEMORY)
    return [speed, memory]
