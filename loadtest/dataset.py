"""The set of real recordings with references that the measurements use, and the baseline beside it.

The set is no part of the repository: it stands in ``../shared/audio``, or where ``--audio`` says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "audio"
MISSING = 2  # exit status


class DatasetMissing(Exception):
    """The folder does not hold the set."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One line of the manifest. ``language`` is Whisper's code, None where there is no speech; ``text`` is the
    reference; ``scored`` says whether an error rate against it means anything; ``expect`` says in words what is right
    for a damaged file."""

    path: Path
    file: str
    seconds: float
    language: str | None
    text: str
    source: str
    category: str
    scored: bool
    expect: str | None = None


@dataclass(frozen=True, slots=True)
class BaselineRow:
    """A published row of the baseline's table: what openai-whisper reached on one group."""

    substitutions: int
    deletions: int
    insertions: int
    words: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """What openai-whisper wrote, by (model, file), and the published table, by (model, group)."""

    hypotheses: dict[tuple[str, str], str]
    table: dict[tuple[str, str], BaselineRow]

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _ in self.hypotheses})


def load(folder: Path) -> list[Recording]:
    """The manifest's recordings, in its order. Raises DatasetMissing."""
    return [_recording(folder, json.loads(line)) for line in _read(folder, "manifest.jsonl").splitlines()]


def load_baseline(folder: Path) -> Baseline:
    """Raises DatasetMissing."""
    data = json.loads(_read(folder, "baseline.json"))
    rows = [row for row in data["table"] if "wer" in row]
    return Baseline(
        hypotheses={(row["model"], row["file"]): row["hyp"] for row in data["hypotheses"]},
        table={
            (row["model"], row["group"]): BaselineRow(row["sub"], row["dele"], row["ins"], row["ref_words"])
            for row in rows
        },
    )


def groups(recording: Recording) -> tuple[str, ...]:
    """The groups whose figures the recording enters, named as in the baseline's table; ``en_long/ALL`` and
    ``synth_long/ALL`` pool what the table gives file by file."""
    category, stem = recording.category, Path(recording.file).stem
    match category:
        case "en_short":
            return "en_short/ALL", f"en_short/{_corpus(recording.source)}"
        case "en_long" | "synth_long":
            return f"{category}/ALL", f"{category}/{stem}"
        case "multilingual":
            return (f"multi/{recording.language}",)
        case _:
            return (category,)


def select(recordings: Iterable[Recording], *categories: str, scored: bool | None = None) -> list[Recording]:
    return [r for r in recordings if r.category in categories and (scored is None or r.scored == scored)]


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--audio", type=Path, default=DEFAULT_FOLDER, help="folder of the recordings (%(default)s)")


def load_or_exit(folder: Path) -> tuple[list[Recording], Baseline]:
    """For commands: without the set there is nothing to measure, so say so and end with status 2."""
    try:
        return load(folder), load_baseline(folder)
    except DatasetMissing as error:
        print(error, file=sys.stderr)
        raise SystemExit(MISSING) from None


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise DatasetMissing(
            f"the set of recordings is not at {folder} ({name}: {error.strerror}); it is no part of the repository: "
            "name its folder with --audio"
        ) from None


def _recording(folder: Path, row: dict[str, Any]) -> Recording:
    return Recording(
        path=folder / row["file"],
        file=row["file"],
        seconds=float(row["seconds"]),
        language=None if row["language"] == "none" else row["language"],
        text=row["text"] or "",
        source=row["source"],
        category=row["category"],
        scored=row["wer"],
        expect=row.get("expect"),
    )


def _corpus(source: str) -> str:
    for name, mark in (
        ("librispeech-test-other", "test-other"),
        ("librispeech-test-clean", "test-clean"),
        ("ljspeech", "LJ Speech"),
    ):
        if mark in source:
            return name
    return "misc"
