"""All kernels beside what a library does instead and beside their bounds, on the GPU at hand::

    python -m loadtest.gpu.kernels --json gpu-kernels.json

The bounds are the rates of a copy and of the library's product of large matrices, measured first, in the same run. Ends
with status 1 where a benchmark failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from loadtest.gpu.kernels import (
    embedding,
    encoder_attention,
    gelu,
    latent_attention,
    layer_norm,
    linear,
    log_mel,
    next_token,
    persistent_step,
    report,
    self_attention,
)
from loadtest.gpu.kernels.report import Rates, Row

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "log_mel": log_mel.measure,
    "linear": linear.measure,
    "encoder_attention": encoder_attention.measure,
    "layer_norm": layer_norm.measure,
    "gelu": gelu.measure,
    "embedding": embedding.measure,
    "self_attention": self_attention.measure,
    "latent_attention": latent_attention.measure,
    "next_token": next_token.measure,
    "persistent_step": persistent_step.measure,
}


def run(names: Sequence[str], keep: Callable[[list[Row]], None]) -> tuple[list[Row], list[str]]:
    """The rows of these benchmarks, and which of them failed; ``keep`` gets all rows so far after each."""
    rows: list[Row] = []
    failed = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            rows += BENCHMARKS[name]()
        except Exception:  # the others' figures are worth having
            traceback.print_exc()
            failed.append(name)
        keep(rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows, failed


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", type=_names, default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)} (all)")
    options = parser.parse_args()
    rates = Rates.measured()
    rows, failed = run(options.only, lambda rows: report.keep(rows, rates, options))
    report.publish(rows, rates, options)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
