"""Adaptive batching beside the best fixed batch, on one GPU, Whisper's shapes with random weights::

    python -m loadtest.gpu.batching --json batching.json --seconds 200
    python -m loadtest.gpu.batching --model turbo --objectives 1,2

Costs are measured first; the grid of fixed batch sizes and waits is simulated with them for every objective, and the
first objective's best fixed batch and the adaptive way are then run on the engine in real time, at loads nearer and
nearer to what each sustains. Ends with status 1 where the goal is missed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from loadtest import report
from loadtest.batching.compare import GOAL, compare
from loadtest.batching.engine import EngineMachine, measure
from loadtest.gpu.work import MODELS, random_weights
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.precision import Compute

ENCODER_SIZES = (1, 2, 4, 8, 16, 32)
STEP_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
ENCODER_START = 16


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(MODELS), default="large-v3", help="(%(default)s)")
    parser.add_argument(
        "--objectives", type=objectives, default=(2.0, 1.0, 5.0), metavar="S,S", help="p99, seconds (2,1,5)"
    )
    parser.add_argument("--seconds", type=float, default=200, help="for all of it, about (%(default)s)")
    parser.add_argument("--runs", type=int, default=6, help="of the engine in real time, about (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    parser.add_argument("--commit", help="of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def objectives(text: str) -> tuple[float, ...]:
    """From an argument: seconds, the one to be confirmed first."""
    given = tuple(float(part) for part in text.split(","))
    if min(given) <= 0:
        raise argparse.ArgumentTypeError("an objective is above 0 seconds")
    return given


def main() -> int:
    options, begun = parse(), time.monotonic()
    device = torch.device("cuda")
    compute, dims = Compute.resolve("cuda", "float16"), MODELS[options.model]
    checkpoint = Checkpoint("random", dims, random_weights(dims, device, torch.float16), None, source="random")
    machine = EngineMachine(checkpoint, compute, slots=max(STEP_SIZES), encoder_batch=max(ENCODER_SIZES))
    console = report.console()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begun:5.0f} s  {text}", highlight=False)

    costs = measure(machine, ENCODER_SIZES, STEP_SIZES, repeats=20, warm_up=40)
    say("encoder, ms by windows: " + ", ".join(f"{n}: {1000 * s:.1f}" for n, s in costs.encoder.items()))
    say("step, ms by slots: " + ", ".join(f"{n}: {1000 * s:.2f}" for n, s in costs.step.items()))
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
        environment = report.environment(options.commit)
        report.write_json(options.json, {"environment": environment, "model": options.model, **result})
    return 0 if result["ratio"] is not None and result["ratio"] >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
