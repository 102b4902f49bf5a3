"""Runs the measuring processes, and keeps whatever they measured."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.gpu.work import WINDOW_S
from loadtest.gpu.worker import Job

SYSTEMS = {
    "openai": "loadtest.gpu.peers.openai_whisper:OpenAIWhisper",
    "transformers": "loadtest.gpu.peers.huggingface:Transformers",
    "ctranslate2": "loadtest.gpu.peers.ctranslate2:CTranslate2",
    "transformers-static": "loadtest.gpu.peers.huggingface:TransformersStatic",
    "engine": "loadtest.gpu.engine:Engine",
    "engine-bytes": "loadtest.gpu.engine:EngineBytes",
    "engine-overlapped": "loadtest.gpu.engine:EngineOverlapped",
}
# A worker stops by itself this much before it would be killed, so that it ends between two sizes.
GRACE_S = 5.0
LOG_LINES = 4


@dataclass(frozen=True)
class Size:
    """One batch size. seconds: of each timed run, windows together; memory_gib: in use on the device afterwards;
    tokens: of the first windows, separated by spaces."""

    batch: int
    seconds: list[float]
    warm_up_s: float
    memory_gib: float | None
    tokens: list[str]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rtfx(self) -> float:
        return self.batch * WINDOW_S / self.median_s


@dataclass
class Run:
    """One system on one model. left_out: batch size → why it has no figures; error: how the process ended, if badly."""

    model: str
    system: str
    name: str = ""
    load_s: float | None = None
    sizes: list[Size] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    error: str | None = None

    def at(self, batch: int) -> Size | None:
        return next((size for size in self.sizes if size.batch == batch), None)

    @property
    def best(self) -> Size | None:
        return max(self.sizes, key=lambda size: size.rtfx, default=None)

    def read(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Takes in what the process reported (pure)."""
        for event in events:
            match event["event"]:
                case "loaded":
                    self.name, self.load_s = event["name"], event["load_s"]
                case "size":
                    self.sizes.append(Size(**{key: value for key, value in event.items() if key != "event"}))
                case _:
                    self.left_out[event["batch"]] = event["reason"]


def run(model: str, system: str, job: Job) -> Run:
    """Measures in a process of its own, which is killed, with all its children, ``job.seconds`` after its start."""
    result = Run(model, system, name=system)
    with tempfile.TemporaryDirectory() as folder:
        events, log = Path(folder) / "events", Path(folder) / "log"
        events.touch()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "loadtest.gpu.worker", str(events)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
            begin = time.monotonic()
            try:
                process.communicate(job.to_json(), timeout=job.seconds + GRACE_S)
            except subprocess.TimeoutExpired:
                result.error = f"killed after {time.monotonic() - begin:.0f} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if result.error is None and process.returncode:
            result.error = _last_words(process.returncode, log.read_text(errors="replace"))
        result.read(json.loads(line) for line in events.read_text().splitlines() if line.endswith("}"))
    return result


def _last_words(status: int, log: str) -> str:
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join([how, *lines[-LOG_LINES:]])[:1000]
