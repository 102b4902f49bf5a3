"""Replicas that follow a load: ``whisper-serve serve --autoscale`` in a Ray cluster of its own."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from loadtest.gpu.clients import wav
from loadtest.server import started
from serve_app.engine.checkpoint import Dims
from serve_app.scaling.readings import STAGES
from serve_app.scaling.replay import Entry, read, replay
from tests.conftest import free_port
from tests.e2e.replicas import pids
from tests.engine.checkpoints import random_tensors, write_openai
from tests.engine.conftest import read_pcm

MICRO = Dims(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=64,
    n_audio_head=1,
    n_audio_layer=1,
    n_vocab=51865,
    n_text_ctx=448,
    n_text_state=64,
    n_text_head=1,
    n_text_layer=1,
)
"""So small that several replicas run on two cores."""

APP = "scaled"
CLIP_S = 4.0
NOTICE_S = 3.0
"""From a step of the load until another replica is wanted."""

Why = tuple[str, str, str]
"""Stage, direction, reason of a decision."""


@dataclass(frozen=True)
class Deployed:
    url: str
    log: Path
    cluster: Path

    def entries(self) -> list[Entry]:
        """The decisions so far."""
        while True:
            with suppress(ValueError):  # a line that is being written
                return [line for line in read(self.log) if isinstance(line, Entry)]

    def changes(self) -> Counter[Why]:
        """Decisions for more or fewer replicas, by the log."""
        counts: Counter[Why] = Counter()
        for entry in self.entries():
            for stage, unit in entry.decision.units.items():
                before = entry.signals.stages[stage].target
                if unit.target != before:
                    counts[stage, "up" if unit.target > before else "down", unit.reason] += 1
        return counts

    def samples(self, metric: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of a metric on the cluster's metrics port."""
        (port,) = [file.read_text() for file in self.cluster.glob("ray/session_latest/metrics_export_port_*")]
        text = httpx.get(f"http://127.0.0.1:{port.strip()}/metrics", timeout=10).text
        families = text_string_to_metric_families(text)
        return [(s.labels, s.value) for family in families for s in family.samples if s.name == metric]

    def shown_changes(self) -> Counter[Why]:
        """As ``changes``, by the metrics."""
        counts: Counter[Why] = Counter()
        for labels, value in self.samples("ray_whisper_scaling_decisions_total"):
            if labels["direction"] != "hold":
                counts[labels["stage"], labels["direction"], labels["reason"]] += int(value)
        return +counts

    def wanted(self) -> dict[str, float]:
        """Replicas by stage, by the metrics."""
        return {labels["stage"]: value for labels, value in self.samples("ray_whisper_scaling_wanted_replicas")}


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployed]:
    config = tmp_path / "config.yaml"
    log = tmp_path / "decisions.jsonl"
    settings = {
        "app_name": APP,
        "model": {"source": str(write_openai(tmp_path / "micro.pt", random_tensors(MICRO), MICRO))},
        "features": {"threads": 1},
        "encoder": {"threads": 1},
        "decoder": {"threads": 1, "max_tokens": 40, "slots": 2},
        "scaling": {
            "topology": "split",
            **{stage: {"max_replicas": 2} for stage in STAGES},
            "cold_start_s": 10.0,
            "down_hold_s": 4.0,
            "panic_window_s": 4.0,
            "decision_log": str(log),
        },
    }
    config.write_text(yaml.safe_dump(settings))
    # short, for the paths of sockets have a limit
    cluster = Path(tempfile.mkdtemp(prefix="scaling"))
    monkeypatch.setenv("RAY_TMPDIR", str(cluster))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = free_port()
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--autoscale", "--port", str(port)]
    try:
        with started([*command, "--config", str(config)], f"http://127.0.0.1:{port}") as server:
            yield Deployed(server.url, log, cluster)
    finally:
        shutil.rmtree(cluster, ignore_errors=True)


class Load:
    """Recordings that are sent at a rate, whether the ones before are done or not, up to a number under way.

    With one replica's rate, of a replica that had the cores to itself, the load is too much for as long as another one
    starts beside it. What bounds the wait is the number.
    """

    most = 64
    """Under way: many seconds of work for one replica, and far below the longest wait, on a slow machine too."""
    timeout_s = 300.0

    def __init__(self, url: str, clip: bytes):
        self._url, self._clip = url, clip
        self.rate = 0.5  # a second
        self.failures: list[str] = []
        """What the application said where it failed."""
        self._pending: list[Future[int]] = []
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(self.most)
        self._room = threading.Semaphore(self.most)
        self._client = httpx.Client(timeout=self.timeout_s, limits=httpx.Limits(max_connections=self.most))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> list[int]:
        """No more; the status of each response."""
        self._ended.set()
        self._thread.join()
        statuses = [each.result() for each in self._pending]
        self._pool.shutdown()
        self._client.close()
        return statuses

    def _run(self) -> None:
        sent = time.monotonic()
        while not self._ended.wait(0.01):
            if time.monotonic() - sent >= 1 / self.rate and self._room.acquire(blocking=False):
                self._pending.append(self._pool.submit(self._send))
                sent = time.monotonic()

    def _send(self) -> int:
        form = {"model": "whisper-1", "language": "en", "temperature": "0.5"}
        file = {"file": ("clip.wav", self._clip)}
        try:
            response = self._client.post(f"{self._url}/v1/audio/transcriptions", files=file, data=form)
        finally:
            self._room.release()
        if response.status_code != 200:
            self.failures.append(f"{response.status_code}: {response.text[:500]}")
        return response.status_code


def beginning(recording: Path, seconds: float) -> bytes:
    """Its first seconds, as a WAV file."""
    return wav(read_pcm(recording)[: int(seconds * 16_000)])


def wait_until(what: str, reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def test_stages_follow_a_load_that_rises_and_falls(deployed: Deployed, sample: Path) -> None:
    def latest() -> Entry:
        return deployed.entries()[-1]

    def known(entry: Entry) -> bool:
        return entry.decision.units["decoder"].rate is not None

    load = Load(deployed.url, beginning(sample, CLIP_S))
    try:
        # what is done in a second is smoothed, so the first rates are too low
        wait_until("its rate is known", lambda: sum(known(entry) for entry in deployed.entries()) > 16, 180)
        wait_until("one suffices", lambda: latest().decision.targets["decoder"] == 1, 180)
        wait_until("one is there", lambda: len(pids("decoder", APP)) == 1, 180)
        rate = latest().decision.units["decoder"].rate
        assert rate is not None

        stepped = time.time()
        load.rate = 4 * rate / CLIP_S
        wait_until("another decoder is wanted", lambda: latest().decision.targets["decoder"] == 2, 90)
        load.rate = rate / CLIP_S
        wait_until("it runs", lambda: latest().signals.stages["decoder"].ready == 2, 300)
        assert len(pids("decoder", APP)) == 2

        load.rate = 0.02
        wait_until("it has gone", lambda: latest().signals.stages["decoder"].target == 1, 300)
    finally:
        statuses = load.end()
    assert (set(statuses), load.failures) == ({200}, [])
    entries = deployed.entries()
    more = next(e for e in entries if e.now > stepped and e.decision.targets["decoder"] == 2)
    assert more.now - stepped <= NOTICE_S
    # Serve did what was decided
    for before, after in itertools.pairwise(entries):
        assert before.decision.targets == {stage: each.target for stage, each in after.signals.stages.items()}
    wait_until("its process has ended", lambda: len(pids("decoder", APP)) == 1, 300)

    count, differences = replay(deployed.log)
    assert count >= len(entries)
    assert differences == []

    changes = deployed.changes()
    assert {("decoder", "down", "fewer")} <= set(changes)
    wait_until("the metrics tell the same", lambda: deployed.shown_changes() == changes, 20)
    assert deployed.wanted() == dict.fromkeys(STAGES, 1)
