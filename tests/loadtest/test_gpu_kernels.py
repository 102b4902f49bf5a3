"""The benchmarks of kernels: what can be said of them without a GPU."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kernels import registry
from loadtest.gpu.kernels import __main__ as command
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.next_token import RULES
from loadtest.gpu.kernels.report import Rates, Row
from loadtest.gpu.timing import CACHE_BYTES, turns
from loadtest.gpu.work import MODELS
from serve_app.engine.rules import rules_of
from serve_app.engine.tokens import Tokens

RATES = Rates(bytes=3e9, flop=750e9)
FAST = Row("fast", "8 × 8", 0.5, bytes=1_200_000_000, library=1.0, more={"PyTorch's other way, ms": 0.75})
BARE = Row("bare", "2", 2.0)


def test_every_kernel_has_a_benchmark() -> None:
    modules = {module.__name__.removeprefix("kernels.") for module in registry.MODULES}
    assert set(command.BENCHMARKS) == modules


def test_the_bound_is_of_what_takes_longer() -> None:
    assert FAST.of_bound(RATES) == pytest.approx(0.8)
    assert replace(FAST, flop=75_000_000_000).of_bound(RATES) == pytest.approx(0.8)
    assert replace(FAST, flop=370_000_000_000).of_bound(RATES) == pytest.approx(370 / 375)
    assert BARE.of_bound(RATES) is None


def test_a_ratio_above_one_is_faster_than_the_library() -> None:
    assert FAST.ratio == 2.0
    assert BARE.ratio is None


def test_the_table_says_what_was_not_measured() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table([FAST, BARE], RATES))
    lines = console.export_text().splitlines()
    assert "3.00 TB/s of a copy, 750 TFLOP/s of a product" in lines[0]
    fast, bare = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line)
    assert fast == ["fast", "8 × 8", "0.5000", "1.0000", "2.00", "80%", "PyTorch's other way, ms 0.75"]
    assert bare == ["bare", "2", "2.0000", "–", "–", "–", ""]


def test_raw_figures_are_written_with_what_they_were_measured_on(tmp_path: Path) -> None:
    report.publish([FAST, BARE], RATES, Namespace(json=tmp_path / "new" / "kernels.json", commit="abc"))
    written = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert written["environment"]["commit"] == "abc"
    assert written["rates_per_ms"] == {"bytes": 3e9, "flop": 750e9}
    assert [row["kernel"] for row in written["rows"]] == ["fast", "bare"]
    assert written["rows"][0]["of_bound"] == pytest.approx(0.8)


def test_a_benchmark_that_fails_leaves_the_others_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(command, "BENCHMARKS", {"a": lambda: [FAST], "b": fail, "c": lambda: [BARE]})
    kept: list[int] = []
    rows, failed = command.run(["a", "b", "c"], lambda rows: kept.append(len(rows)))
    assert rows == [FAST, BARE]
    assert failed == ["b"]
    assert kept == [1, 1, 2]


def test_tokens_are_chosen_by_the_large_models_rules() -> None:
    dims = MODELS["large-v3"]
    rules = rules_of(Tokens(dims).vocabulary, dims)
    assert replace(RULES, suppressed=()) == replace(rules, suppressed=())


@given(size=st.integers(1, 10**11), most=st.integers(2, 300))
def test_memory_leaves_the_cache_before_it_comes_again(size: int, most: int) -> None:
    sets = turns(size, most=most)
    assert 2 <= sets <= most
    assert sets == most or (sets + 1) * size > CACHE_BYTES
