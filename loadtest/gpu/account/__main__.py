"""The comparisons of the published account that this project implements, each as a ratio of one run on one GPU::

    python -m loadtest.gpu.account --json account.json
    python -m loadtest.gpu.account --parts sectors,python         # only some

precision   the whole engine in FP16 and in FP32 without TF32: throughput and memory (processes of their own)
sectors     sectors of global memory that the two plain attention kernels read, by Nsight Compute
python      the first of them beside plain Python and NumPy
mapped      log-mel from samples in mapped host memory, and from a copy
graphs      a decoding step with its CUDA Graph, and launched kernel by kernel
buffering   the next batch's input uploaded while one is computed, and one after the other

Ends with status 1 where a goal is missed or a part has no figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from loadtest import report
from loadtest.gpu.account.attention import python, sectors
from loadtest.gpu.account.comparison import Comparison, NotMeasured, Setting
from loadtest.gpu.account.precision import precision
from loadtest.gpu.account.steps import graphs
from loadtest.gpu.account.uploads import buffering, mapped
from loadtest.gpu.work import MODELS

PARTS: dict[str, Callable[[Setting], list[Comparison]]] = {
    # first those in processes of their own: this one has taken no memory of the GPU by then
    "precision": precision,
    "sectors": sectors,
    "python": python,
    "mapped": mapped,
    "graphs": graphs,
    "buffering": buffering,
}


def measure(
    setting: Setting, parts: Iterable[str], announce: Callable[[str], None]
) -> tuple[list[Comparison], dict[str, str]]:
    """The comparisons, and why parts have none."""
    found: list[Comparison] = []
    missing: dict[str, str] = {}
    for part in parts:
        announce(f"{part} …")
        try:
            found += PARTS[part](setting)
        except NotMeasured as error:
            missing[part] = str(error)
        except Exception as error:  # the other parts are measured all the same
            missing[part] = f"{type(error).__name__}: {error}"
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return found, missing


def table(found: Sequence[Comparison], missing: dict[str, str]) -> Table:
    view = Table(title="ratios within this run")
    for column in ("part", "what", "beside"):
        view.add_column(column, overflow="fold")
    for column in ("unit", "figure", "other", "times", "goal"):
        view.add_column(column, justify="right")
    for row in found:
        goal = "–" if row.goal is None else f"{row.goal:.2f} {'reached' if row.reached else 'missed'}"
        figures = (f"{row.ours:,.4g}", f"{row.other:,.4g}", f"{row.times:,.2f}")
        view.add_row(row.part, row.what, row.beside, row.unit, *figures, goal)
    for part, reason in missing.items():
        view.add_row(part, f"not measured: {reason}", "", "", "", "", "", "")
    return view


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.account", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--model", choices=list(MODELS), default="large-v3", help="whose shapes (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="together, in precision (%(default)s)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for each precision (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try out what does without")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    setting = Setting(MODELS[options.model], options.device, options.windows, options.timeout)
    console: Console = report.console()
    found, missing = measure(setting, options.parts, lambda text: console.print(text, highlight=False))
    console.print(table(found, missing))
    if options.json is not None:
        rows = [asdict(row) | {"times": row.times, "reached": row.reached} for row in found]
        payload = {
            "environment": report.environment(options.commit),
            "model": options.model,
            "comparisons": rows,
            "missing": missing,
        }
        report.write_json(options.json, payload)
    return 1 if missing or any(row.reached is False for row in found) else 0


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


if __name__ == "__main__":
    sys.exit(main())
