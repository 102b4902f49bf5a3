"""Word error rate over real speech, through the HTTP endpoint, beside openai-whisper's with the same weights::

    python -m loadtest.wer                                   # starts a server for base, then one for tiny.en
    python -m loadtest.wer --url http://127.0.0.1:8000       # measures the one that runs there

Ends with status 1 where a goal is missed, 2 where the recordings are absent.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from loadtest import dataset, report, server, traffic
from loadtest.dataset import Baseline, Recording
from loadtest.scoring import Pair, Score, loops, score

MODELS = ("embedded:base", "embedded:tiny.en")
CATEGORIES = ("en_short", "en_noisy", "en_long", "synth_long", "en_pause", "en_spontaneous", "multilingual", "nospeech")
CONCURRENCY = 8


class MeasurementFailed(Exception):
    """The server did not transcribe what it was sent, or nothing tells what to compare it with."""


@dataclass(frozen=True, slots=True)
class Row:
    """A group's score beside the baseline's."""

    group: str
    files: int
    ours: Score
    baseline: Score

    @property
    def points(self) -> float:
        """Difference in percentage points, above 0 where we are worse."""
        return self.ours.percent - self.baseline.percent

    @property
    def words(self) -> int:
        return self.ours.errors - self.baseline.errors


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal, what was measured, and whether it was reached."""

    goal: str
    measured: str
    reached: bool


def points_at_most(limit: float) -> Callable[[Row], Verdict]:
    return lambda row: Verdict(
        f"{row.group}: at most {limit} points above the baseline", f"{row.points:+.2f} points", row.points <= limit
    )


def words_at_most(limit: int) -> Callable[[Row], Verdict]:
    return lambda row: Verdict(
        f"{row.group}: at most {limit} words above the baseline", f"{row.words:+d} words", row.words <= limit
    )


GOALS: Mapping[str, Callable[[Row], Verdict]] = {
    "en_short/ALL": points_at_most(0.3),
    "en_noisy": words_at_most(3),
    "en_long/ALL": points_at_most(0.5),
    "synth_long/ALL": points_at_most(0.5),
}


def baseline_model(names: Iterable[str], known: Sequence[str]) -> str | None:
    """Which of the baseline's models a served model is, by any of its names (``embedded:base``, ``whisper-base``)."""
    for name in names:
        for model in known:
            if re.search(rf"(?:^|[-_:/]){re.escape(model)}$", name):
                return model
    return None


def selected(recordings: Iterable[Recording], categories: Sequence[str], model: str) -> list[Recording]:
    """What is sent: the scored recordings and those without speech; an English-only model gets no other language."""
    english_only = model.endswith(".en")
    return [
        recording
        for recording in recordings
        if recording.category in categories
        and (recording.scored or recording.category == "nospeech")
        and not (english_only and recording.language not in ("en", None))
    ]


def rows(
    recordings: Iterable[Recording], texts: Mapping[str, str], baseline: Baseline, model: str
) -> tuple[list[Row], list[str]]:
    """The scored groups, in order of name, and the files whose transcripts loop."""
    ours: dict[str, list[Pair]] = {}
    theirs: dict[str, list[Pair]] = {}
    looping = []
    for recording in recordings:
        if not recording.scored or recording.language is None:
            continue
        pair = Pair(recording.text, texts[recording.file], recording.language)
        reference = Pair(recording.text, baseline.hypotheses[model, recording.file], recording.language)
        if loops(pair):
            looping.append(recording.file)
        for group in dataset.groups(recording):
            ours.setdefault(group, []).append(pair)
            theirs.setdefault(group, []).append(reference)
    return [Row(group, len(ours[group]), score(ours[group]), score(theirs[group])) for group in sorted(ours)], looping


def verdicts(table: Iterable[Row], looping: Sequence[str], silent: Mapping[str, str]) -> list[Verdict]:
    """The goals that the measured groups decide. ``silent``: what was heard in recordings without speech."""
    found = [GOALS[row.group](row) for row in table if row.group in GOALS]
    found.append(Verdict("no transcript loops", ", ".join(looping) or "none does", not looping))
    if silent:
        heard = [f"{file}: {text.strip()!r}" for file, text in silent.items() if text.strip()]
        measured = "; ".join(heard) or f"{len(silent)} of {len(silent)} empty"
        found.append(Verdict("nospeech: every text is empty", measured, not heard))
    return found


def measure(
    at: server.Server, recordings: Sequence[Recording], concurrency: int, api_key: str | None, console: Console
) -> tuple[list[traffic.Reply], float]:
    """Send all and return the replies and the wall time. Raises MeasurementFailed where one is not a transcript."""
    uploads = [traffic.Upload(recording.file, recording.path, recording.language) for recording in recordings]
    seconds = {recording.file: recording.seconds for recording in recordings}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("seconds of audio", total=sum(seconds.values()))
        begin = time.monotonic()
        replies = asyncio.run(
            traffic.transcribe_all(
                at.url,
                uploads,
                concurrency=concurrency,
                api_key=api_key,
                on_reply=lambda reply: progress.advance(task, seconds[reply.name]),
            )
        )
        wall = time.monotonic() - begin
    failed = [f"{reply.name}: status {reply.status} {reply.message}" for reply in replies if not reply.ok]
    if failed:
        raise MeasurementFailed("not transcribed:\n" + "\n".join(failed))
    return replies, wall


def run(source: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one server; returns the raw results, with the verdicts under ``goals``."""
    recordings, baseline = dataset.load_or_exit(options.audio)
    with server.serving(options.url, source) as at:
        served = asyncio.run(traffic.served_models(at.url, options.api_key))
        names = served if options.url else [source]
        model = options.baseline or baseline_model(names, baseline.models)
        if model is None:
            raise MeasurementFailed(
                f"the baseline has {', '.join(baseline.models)}; the server serves {', '.join(served)}: "
                "name the one to compare with by --baseline"
            )
        sent = selected(recordings, options.categories, model)
        replies, wall = measure(at, sent, options.concurrency, options.api_key, console)
    texts = {reply.name: reply.text for reply in replies}
    table, looping = rows(sent, texts, baseline, model)
    silent = {recording.file: texts[recording.file] for recording in sent if not recording.scored}
    goals = verdicts(table, looping, silent)
    audio = sum(recording.seconds for recording in sent)
    _print(console, model, table, goals, at, audio, wall)
    return {
        "model": model,
        "source": None if options.url else source,
        "served": served,
        "ready_s": at.ready_s,
        "concurrency": options.concurrency,
        "audio_s": audio,
        "wall_s": wall,
        "groups": [asdict(row) for row in table],
        "goals": [asdict(verdict) for verdict in goals],
        "files": [
            {
                "file": recording.file,
                "category": recording.category,
                "language": recording.language,
                "seconds": recording.seconds,
                "wall_s": reply.seconds,
                "hypothesis": reply.text,
            }
            for recording, reply in zip(sent, replies, strict=True)
        ],
    }


def _print(
    console: Console,
    model: str,
    table: Iterable[Row],
    goals: Iterable[Verdict],
    at: server.Server,
    audio: float,
    wall: float,
) -> None:
    view = Table(title=f"{model}: error rate beside openai-whisper's (FP32, same weights)")
    view.add_column("group", no_wrap=True)
    for column in ("files", "words", "errors", "%", "baseline errors", "baseline %", "words more", "points more"):
        view.add_column(column, justify="right")
    for row in table:
        view.add_row(
            row.group,
            str(row.files),
            str(row.ours.words),
            str(row.ours.errors),
            f"{row.ours.percent:.2f}",
            str(row.baseline.errors),
            f"{row.baseline.percent:.2f}",
            f"{row.words:+d}",
            f"{row.points:+.2f}",
        )
    console.print(view)
    for verdict in goals:
        mark = "[green]reached[/]" if verdict.reached else "[red]missed[/] "
        console.print(mark, escape(f"{verdict.goal} · {verdict.measured}"), highlight=False)
    ready = "" if at.ready_s is None else f"start to ready {at.ready_s:.1f} s; "
    console.print(f"{ready}{audio / 60:.1f} minutes of audio in {wall:.0f} s, {audio / wall:.1f} × real time\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.wer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server.add_arguments(parser)
    parser.add_argument("--model", nargs="+", default=MODELS, metavar="SOURCE", help="models to start servers for")
    parser.add_argument("--baseline", help="the baseline's model to compare with (by default told from the name)")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, help="measure only these")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="files in flight (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    dataset.add_argument(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    console = report.console()
    dataset.load_or_exit(options.audio)
    try:
        runs = [run(source, options, console) for source in (options.model if options.url is None else [""])]
    except (MeasurementFailed, server.ServerFailed, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json is not None:
        report.write_json(options.json, {"environment": report.environment(), "runs": runs})
    return 0 if all(goal["reached"] for run in runs for goal in run["goals"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
