"""Recordings of the metrics port under load, in a Prometheus' database."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml

from loadtest.recording import PREFIX
from tests.prometheus import RULES, Prometheus, program, prometheus

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.om.gz"))

SPAN = "1h"
"""For the rates of recordings: whatever its length, a recording is inside."""


class Recording:
    """A recording in a Prometheus' database. begin, end: Unix time of its first and last sample."""

    def __init__(self, server: Prometheus, begin: float, end: float):
        self.server, self.begin, self.end = server, begin, end
        self.of_gpus = bool(server.query("ray_whisper_gpu_power_watts", at=end))

    def value(self, expression: str) -> float:
        """At the end."""
        (value,) = self.server.query(expression, at=self.end).values()
        return value

    def over(self, function: str, metric: str) -> list[float]:
        """``max_over_time`` or another, of every series."""
        window = round(self.end - self.begin) + 1
        return list(self.server.query(f"{function}({metric}[{window}s])", at=self.end).values())

    def has(self, expression: str) -> bool:
        """Whether an expression over metrics and recording rules has a value. No rule was evaluated while it was
        recorded, so each stands for its expression, with the labels that were asked of it."""
        return bool(self.server.query(in_metrics(expression), at=self.end))


@contextmanager
def replayed(path: Path, folder: Path) -> Iterator[Recording]:
    text = gzip.decompress(path.read_bytes()).decode()
    (folder / "recording.om").write_text(text)
    command = [program("promtool"), "tsdb", "create-blocks-from", "openmetrics", "recording.om", "data"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    stamps = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(PREFIX)]
    with prometheus(folder, targets=[]) as server:
        yield Recording(server, min(stamps), max(stamps))


@cache
def recording_rules() -> dict[str, str]:
    """Name → expression."""
    groups = yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def in_metrics(expression: str) -> str:
    """An expression with the recording rules in it written out, and rates over all of a recording."""
    rules = recording_rules()

    def written_out(found: re.Match[str]) -> str:
        inner = in_metrics(rules[found["name"]])
        wanted = re.findall(r'(\w+)="([^"]*)"', found["matchers"] or "")
        for label, value in wanted:
            inner = f'({inner}) and on ({label}) label_replace(vector(1), "{label}", "{value}", "", "")'
        return f"({inner})"

    expression = re.sub(r"\[\w+\]", f"[{SPAN}]", expression)
    return re.sub(r"(?P<name>whisper:[\w:]+)(?:\{(?P<matchers>[^}]*)\})?", written_out, expression)
