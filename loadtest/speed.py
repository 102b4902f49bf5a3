"""Speed on the CPU beside openai-whisper and faster-whisper, on one machine, model and list of files, in one run::

    python -m loadtest.speed --rounds 3 --json speed.json

Each system has the machine to itself while it is measured, and the same cores (``--threads``). The peers take the files
one after the other, as they do; whisper-serve gets them over HTTP, many at once. RTFx is seconds of audio per second.
Ends with status 1 where whisper-serve is not 1.3 times as fast as openai-whisper, 2 where the recordings are absent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import dataset, peers, report, server, traffic
from loadtest.dataset import Recording
from loadtest.scoring import Pair, Score, score

OURS = "whisper-serve"
REFERENCE = "openai-whisper"
SYSTEMS = (REFERENCE, "faster-whisper", OURS)
GOAL = 1.3
CONCURRENCY = 16
LONG_FILES = ("en_long/lj001-3min.flac", "synth_long/piper-modern1.mp3")
SHORT_LIST = 20
IDLE_LOAD = 0.5


class MeasurementFailed(Exception):
    """A system did not transcribe what it was given."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One system's pass over the list. ``start_s``: until it stood ready; it is not counted."""

    system: str
    wall_s: float
    start_s: float
    texts: list[str]


def files(recordings: Sequence[Recording], *, short: bool = False) -> list[Recording]:
    """The fixed list: all scored short English clips and two long recordings, sixteen minutes; the short list has
    twenty clips and one long recording, four minutes."""
    clips = dataset.select(recordings, "en_short", scored=True)
    long = [recording for name in LONG_FILES for recording in recordings if recording.file == name]
    return clips[:SHORT_LIST] + long[1:] if short else clips + long


def confine(cores: int) -> None:
    """Keep this process, and all that it will start, on that many cores. Raises ValueError where there are fewer."""
    allowed = sorted(os.sched_getaffinity(0))
    if cores > len(allowed):
        raise ValueError(f"there are {len(allowed)} cores, not {cores}")
    os.sched_setaffinity(0, allowed[:cores])


def measure(system: str, recordings: Sequence[Recording], options: argparse.Namespace) -> Timing:
    if system != OURS:
        result = peers.run(system, options.model, options.threads, recordings)
        return Timing(system, result.wall_s, result.load_s, result.texts)
    sent = [traffic.Upload(recording.file, recording.path, recording.language) for recording in recordings]
    with server.serving(None, options.model) as at:
        warm_up = asyncio.run(traffic.transcribe_all(at.url, sent[:1], concurrency=1))
        begin = time.monotonic()
        replies = asyncio.run(traffic.transcribe_all(at.url, sent, concurrency=options.concurrency))
        wall = time.monotonic() - begin
    failed = [f"{reply.name}: status {reply.status} {reply.message}" for reply in warm_up + replies if not reply.ok]
    if failed:
        raise MeasurementFailed("not transcribed:\n" + "\n".join(failed))
    assert at.ready_s is not None
    return Timing(OURS, wall, at.ready_s, [reply.text for reply in replies])


def error_rate(timing: Timing, recordings: Sequence[Recording]) -> Score:
    return score(Pair(r.text, text, "en") for r, text in zip(recordings, timing.texts, strict=True))


def ratios(timings: Sequence[Timing], system: str, to: str) -> list[float]:
    """How many times as fast ``system`` was as ``to``, round by round (pure)."""
    walls = {name: [timing.wall_s for timing in timings if timing.system == name] for name in (system, to)}
    return [theirs / ours for ours, theirs in zip(walls[system], walls[to], strict=True)]


def _print(console: Console, timings: Sequence[Timing], recordings: Sequence[Recording]) -> None:
    audio = sum(recording.seconds for recording in recordings)
    view = Table(title=f"{audio / 60:.1f} minutes of audio in {len(recordings)} files")
    for column in ("system", "seconds", "RTFx", "error rate %", f"× {REFERENCE}"):
        view.add_column(column, justify="right")
    for system in dict.fromkeys(timing.system for timing in timings):
        of = [timing for timing in timings if timing.system == system]
        wall = statistics.median(timing.wall_s for timing in of)
        errors = error_rate(of[0], recordings).percent
        ratio = statistics.median(ratios(timings, system, REFERENCE))
        view.add_row(system, f"{wall:.1f}", f"{audio / wall:.2f}", f"{errors:.2f}", f"{ratio:.2f}")
    console.print(view)


def _raw(
    timings: Sequence[Timing], recordings: Sequence[Recording], options: argparse.Namespace, load: float
) -> dict[str, Any]:
    audio = sum(recording.seconds for recording in recordings)
    return {
        "environment": report.environment(),
        "load_average_before": load,
        "model": options.model,
        "threads": options.threads,
        "concurrency": options.concurrency,
        "audio_s": audio,
        "files": [recording.file for recording in recordings],
        "timings": [
            {
                "system": timing.system,
                "start_s": timing.start_s,
                "wall_s": timing.wall_s,
                "rtfx": audio / timing.wall_s,
                "error_percent": error_rate(timing, recordings).percent,
                "texts": timing.texts,
            }
            for timing in timings
        ],
        "ratios": {f"{OURS} / {peer}": ratios(timings, OURS, peer) for peer in SYSTEMS if peer != OURS},
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=server.DEFAULT_MODEL, help="weights of all systems (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="cores of each system (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="files in flight over HTTP (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="passes; the table gives medians (%(default)s)")
    parser.add_argument("--short", action="store_true", help="the list of four minutes instead of sixteen")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    dataset.add_argument(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    recordings = files(dataset.load_or_exit(options.audio)[0], short=options.short)
    console = report.console()
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        console.print(f"[yellow]other work runs on this machine (load average {load:.1f}): the figures mean little[/]")
    timings: list[Timing] = []
    try:
        confine(options.threads)
        for turn in range(options.rounds):
            for system in SYSTEMS:
                console.print(f"round {turn + 1} of {options.rounds}: {system} …")
                timings.append(measure(system, recordings, options))
    except (MeasurementFailed, server.ServerFailed, subprocess.CalledProcessError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    _print(console, timings, recordings)
    if options.json is not None:
        report.write_json(options.json, _raw(timings, recordings, options, load))
    ratio = statistics.median(ratios(timings, OURS, REFERENCE))
    console.print(f"goal: at least {GOAL} × {REFERENCE}; measured {ratio:.2f}")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
