"""What the benchmarks of kernels share: rows, the rates of the GPU at hand, the table, the raw figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loadtest import report as common
from loadtest.gpu.timing import graph_milliseconds


@dataclass(frozen=True, slots=True)
class Rates:
    """What the GPU does in a millisecond: bytes, read and written, of a copy, and operations of the library's FP16
    product of large matrices."""

    bytes: float
    flop: float

    @classmethod
    def measured(cls) -> Rates:
        """Of the GPU at hand, in short bursts."""
        given = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        copied = torch.empty_like(given)
        copy = graph_milliseconds([lambda: copied.copy_(given)] * 4)
        n = 8192
        a, b = (torch.randn(n, n, device="cuda").half() for _ in range(2))
        c = torch.empty_like(a)
        product = graph_milliseconds([lambda: torch.mm(a, b, out=c)] * 4)
        return cls(2 * given.nbytes / copy, 2 * n**3 / product)


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel at one shape.

    bytes, flop: the least that the work moves and computes, 0 where it says nothing. library: milliseconds of what a
    library does instead, if anything does. more: further figures, each with what it is.
    """

    kernel: str
    shape: str
    milliseconds: float
    bytes: int = 0
    flop: int = 0
    library: float | None = None
    more: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the library."""
        return None if self.library is None else self.library / self.milliseconds

    def of_bound(self, rates: Rates) -> float | None:
        """The share of the GPU's rate that it reaches: of bytes or arithmetic, whichever takes longer."""
        bound = max(self.bytes / rates.bytes, self.flop / rates.flop)
        return bound / self.milliseconds if bound else None


def table(rows: Sequence[Row], rates: Rates) -> Table:
    title = f"bounds: {rates.bytes / 1e9:.2f} TB/s of a copy, {rates.flop / 1e9:.0f} TFLOP/s of a product"
    view = Table(title=title, title_justify="left")
    for column in ("kernel", "shape"):
        view.add_column(column, overflow="fold")
    for column in ("ms", "library, ms", "ratio", "of bound"):
        view.add_column(column, justify="right")
    view.add_column("more", overflow="fold")
    for row in rows:
        of_bound = row.of_bound(rates)
        view.add_row(
            row.kernel,
            row.shape,
            f"{row.milliseconds:.4f}",
            "–" if row.library is None else f"{row.library:.4f}",
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            "–" if of_bound is None else f"{of_bound:.0%}",
            ", ".join(f"{name} {figure:.4g}" for name, figure in row.more.items()),
        )
    return view


def raw(rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    return {
        "rates_per_ms": asdict(rates),
        "rows": [asdict(row) | {"ratio": row.ratio, "of_bound": row.of_bound(rates)} for row in rows],
    }


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the raw figures there")
    made.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return made


def publish(rows: Sequence[Row], rates: Rates, options: argparse.Namespace) -> None:
    """Prints the table, and keeps the raw figures."""
    common.console().print(table(rows, rates))
    keep(rows, rates, options)


def keep(rows: Sequence[Row], rates: Rates, options: argparse.Namespace) -> None:
    """Writes the raw figures where ``parser`` has been told to, if it has."""
    if options.json is not None:
        environment = common.environment()
        environment["commit"] = options.commit or environment["commit"]
        common.write_json(options.json, {"environment": environment, **raw(rows, rates)})


def main(measure: Callable[[], Sequence[Row]], about: str | None) -> None:
    """The command of a benchmark that has no options of its own."""
    options = parser(about).parse_args()
    rates = Rates.measured()
    publish(measure(), rates, options)
