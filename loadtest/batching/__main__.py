"""Adaptive batching beside the best fixed batch, on the CPU, with the embedded model::

    python -m loadtest.batching --json batching-cpu.json

Costs are measured first; the grid of fixed batch sizes and waits is simulated with them for every objective, and the
first objective's best fixed batch and the adaptive way are then run on the engine in real time, at loads nearer and
nearer to what each sustains. Ends with status 1 where the goal is missed. On a GPU: ``loadtest.gpu.batching``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from loadtest import report
from loadtest.batching.compare import GOAL, compare
from loadtest.batching.engine import EngineMachine, measure
from loadtest.gpu.batching import objectives
from serve_app.engine.checkpoint import load
from serve_app.engine.precision import Compute

ENCODER_SIZES = (1, 2, 4)
STEP_SIZES = (1, 2, 4, 8, 12, 16)
ENCODER_START = 4
IDLE_LOAD = 0.5


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="embedded:tiny.en", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "--objectives", type=objectives, default=(10.0, 5.0, 20.0), metavar="S,S", help="p99, seconds (10,5,20)"
    )
    parser.add_argument("--seconds", type=float, default=330, help="for all of it, about (%(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="of the engine in real time, about (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    return parser.parse_args(arguments)


def main() -> int:
    options, begun, busy = parse(), time.monotonic(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    machine = EngineMachine(
        load(options.model), Compute.resolve("cpu", "auto"), slots=max(STEP_SIZES), encoder_batch=max(ENCODER_SIZES)
    )
    console = report.console()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begun:5.0f} s  {text}", highlight=False)

    if busy > IDLE_LOAD:
        say(f"other work runs on this machine (load average {busy:.1f}): the figures mean little")
    costs = measure(machine, ENCODER_SIZES, STEP_SIZES, repeats=8, warm_up=20)
    say("encoder, ms by windows: " + ", ".join(f"{n}: {1000 * s:.0f}" for n, s in costs.encoder.items()))
    say("step, ms by slots: " + ", ".join(f"{n}: {1000 * s:.1f}" for n, s in costs.step.items()))
    result = compare(
        machine,
        costs,
        options.objectives,
        encoder_start=ENCODER_START,
        seconds=options.seconds - (time.monotonic() - begun),
        runs=options.runs,
        say=say,
    )
    if options.json is not None:
        settings = {"model": options.model, "threads": options.threads, "load_average_before": busy}
        report.write_json(options.json, {"environment": report.environment(), **settings, **result})
    return 0 if result["ratio"] is not None and result["ratio"] >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
