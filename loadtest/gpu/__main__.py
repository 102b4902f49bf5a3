"""The peers and the engine on one GPU, on the same work, in one run::

    python -m loadtest.gpu --models large-v3,turbo --systems openai,ctranslate2 --batches 1,64,128 --json gpu-peers.json

Every system runs in a process of its own, one after the other, over ascending batch sizes until memory runs out or its
throughput has fallen twice. ``loadtest.gpu.work`` says what the work is. A system can also be given as
``NAME=MODULE:CLASS``. Ends with status 1 where a system ended badly or has no figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from loadtest import report as common
from loadtest.gpu import report
from loadtest.gpu.run import GRACE_S, SYSTEMS, Run, run
from loadtest.gpu.work import MODELS
from loadtest.gpu.worker import Job

BATCHES = (1, 8, 16, 32, 64, 96, 128, 192, 256)
MOST_SECONDS = 24 * 3600.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=_models, default=list(MODELS), help=f"of {', '.join(MODELS)} (all)")
    parser.add_argument("--systems", type=_systems, default=dict(SYSTEMS), help=f"of {', '.join(SYSTEMS)} (all)")
    parser.add_argument(
        "--batches",
        type=_batches,
        action="append",
        default=[("", BATCHES)],
        metavar="[MODEL|SYSTEM|MODEL/SYSTEM=]1,64,…",
        help="windows together, for all or for some; may be repeated, the most particular holds",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a size (%(default)s)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a system and model (%(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=MOST_SECONDS, help="seconds for all")
    parser.add_argument("--json", type=Path, help="write the raw results there, anew after every system")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, announce: Callable[[str], None], keep: Callable[[list[Run]], None]) -> None:
    """Every model, every system; ``keep`` gets all runs so far after each."""
    end = time.monotonic() + options.budget_seconds
    runs: list[Run] = []
    for name, path in options.systems.items():
        for model in options.models:
            seconds = min(options.timeout, end - time.monotonic() - GRACE_S)
            if seconds <= 0:
                runs.append(Run(model, name, name, error="not begun: the time for all is spent"))
            else:
                announce(f"{model}: {name} …")
                batches = batches_of(options.batches, model, name)
                job = Job(path, MODELS[model], batches, repeats=options.repeats, seconds=seconds)
                runs.append(run(model, name, job))
            keep(runs)


def batches_of(given: Sequence[tuple[str, tuple[int, ...]]], model: str, system: str) -> tuple[int, ...]:
    """Whose batches are asked for: those of the model and system, else of the system, of the model, of all (pure)."""
    named = dict(given)
    return next(named[key] for key in (f"{model}/{system}", system, model, "") if key in named)


def main() -> int:
    options = parse()
    console = common.console()
    runs: list[Run] = []

    def keep(so_far: list[Run]) -> None:
        runs[:] = so_far
        if options.json is not None:
            environment = common.environment()
            environment["commit"] = options.commit or environment["commit"]
            common.write_json(options.json, {"environment": environment, **report.raw(runs)})

    measure(options, lambda text: console.print(text, highlight=False), keep)
    _print(console, runs)
    return 1 if any(one.error is not None or not one.sizes for one in runs) else 0


def _print(console: Console, runs: Sequence[Run]) -> None:
    for model in dict.fromkeys(one.model for one in runs):
        console.print(report.table(model, [one for one in runs if one.model == model]))


def _models(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return names


def _systems(text: str) -> dict[str, str]:
    named = {name: path for name, _, path in (part.partition("=") for part in text.split(","))}
    if unknown := [name for name, path in named.items() if not path and name not in SYSTEMS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    return {name: path or SYSTEMS[name] for name, path in named.items()}


def _batches(text: str) -> tuple[str, tuple[int, ...]]:
    whose, _, numbers = text.rpartition("=")
    sizes = sorted({int(size) for size in numbers.split(",")})
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError("a batch has at least one window")
    return whose, tuple(sizes)


if __name__ == "__main__":
    raise SystemExit(main())
