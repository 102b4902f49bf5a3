"""The table and the raw figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from loadtest.gpu.run import Run, Size
from loadtest.gpu.work import NEW_TOKENS, SEED, WINDOW_S

COMPARED = 64  # windows together, where systems are compared at one size
REFERENCE = "openai"


def table(model: str, runs: Sequence[Run]) -> Table:
    """Of one model: its runs in their order."""
    view = Table(title=f"{model}: RTFx, {NEW_TOKENS} tokens a window, float16")
    columns = ("system", "one window alone, s", f"RTFx at {COMPARED}", "best RTFx (windows)", "tokens alike, %")
    for column in columns:
        view.add_column(column, justify="left" if column == "system" else "right")
    view.add_column("not measured", overflow="fold")
    reference = next((run for run in runs if run.system == REFERENCE), None)
    for run in runs:
        alone, compared, best = run.at(1), run.at(COMPARED), run.best
        missing = [f"{batch}: {reason:.60}" for batch, reason in run.left_out.items()]
        view.add_row(
            run.name,
            f"{alone.median_s:.3f}" if alone else "–",
            f"{compared.rtfx:,.0f}" if compared else "–",
            f"{best.rtfx:,.0f} ({best.batch})" if best else "–",
            _alike_text(run, reference),
            "; ".join(missing if run.error is None else [*missing, run.error]),
        )
    return view


def alike(a: Sequence[Size], b: Sequence[Size]) -> float | None:
    """The share of tokens that two systems chose alike, place by place, in the windows whose tokens were kept, at the
    sizes that both have (pure); None where they share none. It shows that both ran the same model: rounding alone makes
    some windows part ways for a while."""
    theirs = {size.batch: size.tokens for size in b}
    pairs = [
        pair
        for size in a
        for one, other in zip(size.tokens, theirs.get(size.batch, []), strict=False)
        for pair in zip(one.split(), other.split(), strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def raw(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "work": {"window_s": WINDOW_S, "new_tokens": NEW_TOKENS, "dtype": "float16", "seed": SEED},
        "runs": [
            asdict(run)
            | {"sizes": [asdict(size) | {"median_s": size.median_s, "rtfx": size.rtfx} for size in run.sizes]}
            for run in runs
        ],
    }


def _alike_text(run: Run, reference: Run | None) -> str:
    share = alike(run.sizes, reference.sizes) if reference and run is not reference else None
    return "–" if share is None else f"{100 * share:.0f}"
