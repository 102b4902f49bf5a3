"""Tokens on real weights and speech: the engine and openai-whisper in FP16, each beside openai-whisper in FP32::

    python -m loadtest.gpu.fidelity --model embedded:base --json fidelity.json

Windows, languages and prompts are those of ``loadtest.identity``; openai-whisper's FP32 greedy tokens, made in the same
run on the same GPU without TF32, are what is right. Two questions are asked of a system. Forced: given the right tokens
so far, is the next one it would choose, under the rules, the right one? Free: does it write the whole window the same?
openai-whisper's FP16 runs window by window, so that its free run is its forced run up to its first mistake: it is right
free where it is right forced. The engine's windows share slots, so it runs both.

A mistake comes with the margin by which FP32 preferred its token: the difference of the two logits; where one is text
and the other a timestamp, of the timestamps' joint likelihood and the likeliest text, which is what the rules compare.

Word error rates are those of all recordings with a reference: of what the engine writes free, and of what is right.

With ``--device cpu`` all of it runs in FP32, to try it out: openai-whisper beside itself then has no mistake.

Ends with status 1 where the engine misses a goal, 2 without recordings.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest import dataset, report
from loadtest.dataset import Recording
from loadtest.gpu.fidelity.counting import GOAL_FORCED, GOAL_FREE, GOAL_WER, System, count, error_rate
from loadtest.gpu.fidelity.engine import Engine
from loadtest.gpu.fidelity.reference import Reference, Right, Window, exactly
from loadtest.identity import CATEGORIES, Samples, read_windows
from loadtest.scoring import Score
from serve_app.engine.checkpoint import Checkpoint, load
from serve_app.engine.precision import Compute
from serve_app.engine.states import Bits

SLOTS = 32
LISTED = 20  # mistakes shown on the screen; the JSON has all


Texts = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """texts, right_texts: by file, of its windows: what the engine wrote free, and what is right."""

    ours: System
    theirs: System
    texts: Texts
    right_texts: Texts


@torch.no_grad()
def reference(
    model: Reference, recordings: Sequence[Recording], cut: Sequence[Sequence[Samples]], device: torch.device
) -> Iterator[tuple[Window, Right]]:
    """Every window with what is right: the text of the window before, in FP32, is its prompt."""
    for recording, windows in zip(recordings, cut, strict=True):
        prompt = None
        for index, samples in enumerate(windows):
            window = Window(f"{recording.file}#{index}", recording.file, samples, recording.language or "en", prompt)
            with exactly(device):
                right = model.right(window)
            yield window, right
            prompt = right.text


@torch.no_grad()
def compare(
    checkpoint: Checkpoint,
    recordings: Sequence[Recording],
    cut: Sequence[Sequence[Samples]],
    device: torch.device,
    slots: int = SLOTS,
    state_bits: Bits = 16,
) -> Outcome:
    """The engine and openai-whisper's FP16 (on the CPU: both FP32), beside openai-whisper's FP32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    fp16 = device.type == "cuda"
    precision = "FP16" if fp16 else "FP32"
    model = Reference(checkpoint, device)
    engine = Engine(checkpoint, Compute.resolve(device.type, "float16" if fp16 else "float32"), slots, state_bits)
    ours, theirs = System(f"whisper-serve, {precision}"), System(f"openai-whisper, {precision}")
    texts: Texts = defaultdict(list)
    right_texts: Texts = defaultdict(list)
    total = sum(map(len, cut))
    windows = track(reference(model, recordings, cut, device), "windows", total=total, console=Console(stderr=True))
    for group in _groups(windows, slots):
        together = [window for window, _ in group]
        states = engine.encode(together)
        forced = engine.forced(together, states, [right.chosen for _, right in group])
        free = engine.free(together, states)
        for (window, right), ours_forced, ours_free in zip(group, forced, free, strict=True):
            end = engine.tokens.vocabulary.end
            whole = right.chosen[:-1] if right.chosen[-1] == end else right.chosen
            count(ours, window, right, ours_forced, ours_free.tokens == whole, engine.tokens)
            texts[window.file].append(ours_free.text)
            right_texts[window.file].append(right.text)
            theirs_forced = model.forced(window, right.chosen, fp16=fp16)
            count(theirs, window, right, theirs_forced, theirs_forced == right.chosen, engine.tokens)
    return Outcome(ours, theirs, texts, right_texts)


def _groups(windows: Iterable[tuple[Window, Right]], size: int) -> Iterator[list[tuple[Window, Right]]]:
    group: list[tuple[Window, Right]] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _print(console: Console, name: str, systems: Sequence[System]) -> None:
    table = Table(title=f"{name}: beside openai-whisper's greedy tokens in FP32")
    for column in ("system", "tokens", "right, forced", "%", "windows", "right, free", "%", "margin of mistakes"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in systems:
        margins = system.margins
        spread = f"median {statistics.median(margins):.3f}, most {max(margins):.3f}" if margins else "–"
        table.add_row(
            system.name,
            str(system.positions),
            str(system.forced),
            f"{100 * system.forced_share:.3f}",
            str(system.windows),
            str(system.free),
            f"{100 * system.free_share:.2f}",
            spread,
        )
    console.print(table)
    for system in systems:
        for mistake in system.mistakes[:LISTED]:
            by = "forbidden in FP32" if mistake.margin is None else f"margin {mistake.margin:.4f}"
            line = f"{mistake.window} at {mistake.position}: {mistake.chosen!r} for {mistake.right!r}, {by}"
            console.print(f"{system.name}: {line}", highlight=False, markup=False)


def goals(outcome: Outcome, rates: tuple[Score, Score]) -> dict[str, bool]:
    """Which are reached (pure). rates: word error rates, ours and the right one."""
    ours, right = rates
    goal = f"forced at least {100 * GOAL_FORCED:g} %, free at least {100 * GOAL_FREE:g} %"
    return {
        goal: outcome.ours.reached,
        "no worse than openai-whisper's FP16": outcome.ours.is_no_worse_than(outcome.theirs),
        f"word error rate within {GOAL_WER} points": ours.percent <= right.percent + GOAL_WER,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dataset.add_argument(parser)
    parser.add_argument("--model", default="embedded:base", help="checkpoint (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--slots", type=int, default=SLOTS, help="windows that the engine decodes together (%(default)s)"
    )
    parser.add_argument(
        "--state-bits", type=int, choices=(8, 16), default=16, help="of the engine's encoder states (%(default)s)"
    )
    parser.add_argument("--files", type=int, help="only so many recordings, spread over the set")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    recordings, _ = dataset.load_or_exit(options.audio)
    checkpoint = load(options.model)
    chosen = [r for r in dataset.select(recordings, *CATEGORIES) if checkpoint.dims.multilingual or r.language == "en"]
    if options.files is not None:
        chosen = chosen[:: max(1, len(chosen) // options.files)][: options.files]
    cut = asyncio.run(read_windows(chosen))
    began = time.monotonic()
    outcome = compare(checkpoint, chosen, cut, torch.device(options.device), options.slots, options.state_bits)
    seconds = time.monotonic() - began
    console, systems = report.console(), (outcome.ours, outcome.theirs)
    _print(console, checkpoint.name, systems)
    rates = error_rate(chosen, outcome.texts), error_rate(chosen, outcome.right_texts)
    for name, rate in zip((outcome.ours.name, "openai-whisper, FP32"), rates, strict=True):
        line = f"word error rate: {name}: {rate.errors} errors in {rate.words} words, {rate.percent:.2f} %"
        console.print(line, highlight=False)
    reached = goals(outcome, rates)
    for goal, is_reached in reached.items():
        console.print(f"{goal}: {'reached' if is_reached else 'missed'}", highlight=False)
    if options.json is not None:
        rows = [
            asdict(system) | {"forced_share": system.forced_share, "free_share": system.free_share}
            for system in systems
        ]
        payload = {
            "environment": report.environment(options.commit),
            "model": checkpoint.name,
            "device": options.device,
            "slots": options.slots,
            "state_bits": options.state_bits,
            "seconds": seconds,
            "systems": rows,
            "error_rates": {name: asdict(rate) for name, rate in zip(("ours", "right"), rates, strict=True)},
            "goals": reached,
            "texts": outcome.texts,
            "right_texts": outcome.right_texts,
        }
        report.write_json(options.json, payload)
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
