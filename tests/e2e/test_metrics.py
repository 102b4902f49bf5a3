"""What the running application tells a real Prometheus, which scrapes it and evaluates the recording rules."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from serve_app import metrics
from serve_app.engine import work
from serve_app.engine.checkpoint import load
from serve_app.metrics import DECLARED
from serve_app.scaling.readings import CallerReading, Reading, ReplicaReading, decode
from tests.e2e.replicas import occupancy, pids
from tests.e2e.test_scaling import beginning
from tests.metrics.boards import OF_GPUS
from tests.prometheus import Prometheus, prometheus

STAGES = ("features", "encoder", "decoder")
REQUESTS = 6

WITH_A_GPU = {metric.name for metric in OF_GPUS}
WITH_A_POLICY = {metric.name for metric in (metrics.SCALING_DECISIONS, metrics.SCALING_WANTED, metrics.SCALING_CURRENT)}
"""Metrics of an application without a GPU and with fixed numbers of replicas: all but these."""


@pytest.fixture(scope="module")
def scraper(application: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes every node of the session's cluster."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as server:
        deadline = time.monotonic() + 60
        while len(server.targets_up()) < len(targets):
            assert time.monotonic() < deadline, "the nodes' metrics ports do not answer"
            time.sleep(0.2)
        yield server


def transcribe(url: str, file: Path | tuple[str, bytes]) -> httpx.Response:
    audio = (file.name, file.read_bytes()) if isinstance(file, Path) else file
    form = {"model": "whisper-1", "language": "en", "response_format": "verbose_json"}
    return httpx.post(f"{url}/v1/audio/transcriptions", files={"file": audio}, data=form, timeout=300)


class Counts:
    """What counters have counted since this was made, all processes together. What a process has counted that died
    before goes away some time later, so each process's counters are looked at by themselves."""

    def __init__(self, scraper: Prometheus):
        self._scraper = scraper
        self._before = scraper.settled(self.selectors())

    @staticmethod
    def selectors() -> list[str]:
        stages = [f'ray_whisper_stage_windows_total{{stage="{s}",outcome="done"}}' for s in STAGES]
        outcomes = [f'ray_whisper_requests_total{{outcome="{o}"}}' for o in metrics.REQUEST_OUTCOMES]
        batched = [f'ray_whisper_stage_batched_windows_total{{stage="{s}"}}' for s in STAGES]
        operations = [f'ray_whisper_stage_operations_total{{stage="{s}"}}' for s in STAGES]
        latency = [f'ray_whisper_stage_latency_seconds_count{{stage="{s}"}}' for s in STAGES]
        wait = [f'ray_whisper_stage_wait_seconds_count{{stage="{s}"}}' for s in STAGES]
        audio = [f'ray_whisper_stage_audio_seconds_total{{stage="{s}"}}' for s in STAGES]
        single = ["ray_whisper_request_audio_seconds_total", "ray_whisper_tokens_total"]
        single += ["ray_whisper_request_seconds_count", "ray_whisper_request_rtfx_count"]
        single += ["ray_whisper_stage_retries_total", "ray_whisper_stage_errors_total"]
        return [*stages, *outcomes, *batched, *operations, *latency, *wait, *audio, *single]

    def since(self, selector: str) -> float:
        before = self._before[selector]
        return sum(count - before.get(labels, 0.0) for labels, count in self._scraper.query(selector).items())

    def wait_for(self, selector: str, count: float) -> None:
        deadline = time.monotonic() + 60
        while (now := self.since(selector)) < count:
            assert time.monotonic() < deadline, f"{selector} has counted {now}, not {count}"
            time.sleep(0.5)

    def settle(self) -> None:
        self._scraper.settled(self.selectors())


@pytest.fixture(scope="module")
def counted(scraper: Prometheus, application: str, sample: Path) -> tuple[Counts, list[dict[str, Any]]]:
    """Some recordings of one window each, one that is none, and what was counted meanwhile."""
    # every process reports by itself: what all have counted before is only known when all have reported
    assert transcribe(application, sample).status_code == 200
    scraper.wait_for('sum(ray_whisper_requests_total{outcome="done"})', 1)
    for stage in STAGES:
        scraper.wait_for(f'sum(ray_whisper_stage_windows_total{{stage="{stage}",outcome="done"}})', 1)
    counts = Counts(scraper)
    with ThreadPoolExecutor(REQUESTS) as pool:
        responses = list(pool.map(lambda _: transcribe(application, sample), range(REQUESTS)))
    assert [response.status_code for response in responses] == [200] * REQUESTS
    assert transcribe(application, ("talk.mp3", b"this is text, not sound" * 100)).status_code == 400
    for stage in STAGES:
        counts.wait_for(f'ray_whisper_stage_windows_total{{stage="{stage}",outcome="done"}}', REQUESTS)
    counts.wait_for('ray_whisper_requests_total{outcome="invalid"}', 1)
    counts.settle()
    return counts, [response.json() for response in responses]


Counted = tuple[Counts, list[dict[str, Any]]]


@pytest.mark.parametrize("stage", STAGES)
def test_every_window_that_was_sent_is_counted_in_every_stage(counted: Counted, stage: str) -> None:
    counts, _ = counted
    assert counts.since(f'ray_whisper_stage_windows_total{{stage="{stage}",outcome="done"}}') == REQUESTS
    assert counts.since(f'ray_whisper_stage_latency_seconds_count{{stage="{stage}"}}') == REQUESTS
    assert counts.since(f'ray_whisper_stage_wait_seconds_count{{stage="{stage}"}}') == REQUESTS


def test_requests_are_counted_by_their_outcome(counted: Counted) -> None:
    counts, _ = counted
    by_outcome = {o: counts.since(f'ray_whisper_requests_total{{outcome="{o}"}}') for o in metrics.REQUEST_OUTCOMES}
    assert by_outcome == dict.fromkeys(metrics.REQUEST_OUTCOMES, 0) | {"done": REQUESTS, "invalid": 1}
    assert counts.since("ray_whisper_request_seconds_count") == REQUESTS
    assert counts.since("ray_whisper_request_rtfx_count") == REQUESTS
    assert counts.since("ray_whisper_stage_retries_total") == 0
    assert counts.since("ray_whisper_stage_errors_total") == 0


def test_the_seconds_of_audio_are_those_of_the_recordings(counted: Counted) -> None:
    counts, responses = counted
    seconds = sum(response["duration"] for response in responses)
    assert counts.since("ray_whisper_request_audio_seconds_total") == pytest.approx(seconds, abs=0.1)
    for stage in STAGES:
        counted_s = counts.since(f'ray_whisper_stage_audio_seconds_total{{stage="{stage}"}}')
        assert counted_s == pytest.approx(seconds, abs=0.1)


def test_the_tokens_are_those_of_the_segments(counted: Counted) -> None:
    """Segments have their texts' and timestamps' tokens; a window has at most one timestamp more."""
    counts, responses = counted
    in_segments = sum(len(segment["tokens"]) for response in responses for segment in response["segments"])
    assert in_segments > 0
    assert in_segments <= counts.since("ray_whisper_tokens_total") <= in_segments + REQUESTS


def test_the_operations_are_those_of_the_windows_and_steps(counted: Counted) -> None:
    counts, _ = counted
    dims = load("embedded:base").dims
    each = {"features": work.features_operations(dims), "encoder": work.encoder_operations(dims)}
    for stage, operations in each.items():
        counted_operations = counts.since(f'ray_whisper_stage_operations_total{{stage="{stage}"}}')
        assert counted_operations == pytest.approx(REQUESTS * operations)
        assert counts.since(f'ray_whisper_stage_batched_windows_total{{stage="{stage}"}}') == REQUESTS
    steps = counts.since('ray_whisper_stage_batched_windows_total{stage="decoder"}')
    tokens = counts.since("ray_whisper_tokens_total")
    assert tokens < steps <= tokens + 8 * REQUESTS  # start sequence, end, a step more
    operations = counts.since('ray_whisper_stage_operations_total{stage="decoder"}')
    assert operations == pytest.approx(steps * work.step_operations(dims))


def test_every_metric_of_a_run_without_a_gpu_is_there_with_its_labels(scraper: Prometheus, counted: Counted) -> None:
    missing = []
    for metric in DECLARED.values():
        if metric.name in WITH_A_GPU | WITH_A_POLICY:
            continue
        name = f"{metric.exported}_count" if metric.kind == "histogram" else metric.exported
        found = scraper.query(name)
        if not found:
            missing.append(name)
        for labels in found:
            named = dict(labels)
            assert all(named.get(label) for label in metric.labels), (name, named)
    assert missing == []


def test_gauges_are_of_every_replica_and_within_their_range(scraper: Prometheus, counted: Counted) -> None:
    for stage in STAGES:
        replicas = f'ray_whisper_stage_busy{{stage="{stage}"}}'
        assert scraper.value(f"count({replicas})") == 2, "two replicas of each stage run"
        for share in ("whisper_stage_busy", "whisper_stage_fill", "whisper_stage_saturation"):
            values = list(scraper.query(f'ray_{share}{{stage="{stage}"}}').values())
            assert all(0 <= value <= 1 for value in values), share
    utilization = "ray_whisper_sm_utilization"
    scraper.wait_for(f"count({utilization})", 2 * len(STAGES))  # each is told once a second, and may come late
    kinds = scraper.query(f"count by (kind, gpu) ({utilization})")
    assert list(kinds) == [(("gpu", "cpu"), ("kind", "cpu_busy"))]
    # nothing waits or runs any more
    for gauge in ("stage_queue_windows", "stage_running_windows", "credit_queue_windows", "requests_active"):
        assert scraper.value(f"sum(ray_whisper_{gauge})") == 0, gauge


def test_gauges_see_work_while_it_is_done(scraper: Prometheus, application: str, shared_audio: Path) -> None:
    long = "long.wav", beginning(shared_audio / "en_long" / "lj001-3min.flac", 50)
    peaks: dict[str, float] = {}
    expressions = {
        "active": "sum(ray_whisper_requests_active)",
        "busy": 'max(ray_whisper_stage_busy{stage="encoder"})',
        "stand-in": 'max(ray_whisper_sm_utilization{kind="cpu_busy",stage="encoder"})',
        "fill": 'max(ray_whisper_stage_fill{stage="decoder"})',
        "running": 'sum(ray_whisper_stage_running_windows{stage="decoder"})',
    }
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(transcribe, application, long)
        while not request.done():
            for name, expression in expressions.items():
                peaks[name] = max(peaks.get(name, 0.0), scraper.value(expression))
            time.sleep(0.2)
        assert request.result().status_code == 200
    assert peaks["active"] == 1
    assert peaks["busy"] > 0.5
    assert peaks["stand-in"] > 0.5
    assert 0 < peaks["fill"] <= 1
    assert peaks["running"] >= 1


def test_replicas_and_callers_give_their_readings(application: str, sample: Path) -> None:
    """What Serve asks of them where they are autoscaled."""
    before = time.time()
    with ThreadPoolExecutor(REQUESTS) as pool:
        pending = [pool.submit(transcribe, application, sample) for _ in range(REQUESTS)]
        seen, callers = [], []
        while not all(request.done() for request in pending):
            seen += readings("decoder", ReplicaReading)
            callers += readings("api", CallerReading)
            time.sleep(0.2)
    assert max(reading.busy for reading in seen) > 0.5
    assert max(reading.running_windows for reading in seen) >= 1
    assert max(reading.fill for reading in seen) > 0
    assert max(caller.active for caller in callers) == REQUESTS
    ats = [*(reading.at for reading in seen), *(caller.at for caller in callers)]
    assert all(before < at < time.time() + 1 for at in ats)
    for stage in STAGES:
        for reading in readings(stage, ReplicaReading):
            assert (reading.gpu_share, reading.sm_utilization, reading.dram_utilization) == (None, None, None)
            assert (reading.saturation, reading.queued_windows, reading.oldest_wait_s) == (1.0, 0, 0.0)
            assert reading.rate is None or reading.rate > 0
    (caller,) = readings("api", CallerReading)
    assert (caller.active, caller.encoder_windows, caller.encoder_s) == (0, 0, 0.0)


def readings(deployment: str, kind: type[Reading]) -> list[Reading]:
    handle = serve.get_deployment_handle(deployment, "whisper")
    each: list[dict[str, float]] = handle.broadcast("record_autoscaling_stats").results(timeout_s=20)
    return [decode(kind, values) for values in each]


def test_the_recording_rules_are_evaluated(
    scraper: Prometheus, counted: Counted, application: str, sample: Path
) -> None:
    end = time.monotonic() + 12  # rates want several scrapes on both sides
    while time.monotonic() < end:
        assert transcribe(application, sample).status_code == 200
    time.sleep(3)
    assert scraper.rule_errors() == {}
    assert scraper.query("whisper:stage_replicas:count") == {
        (("__name__", "whisper:stage_replicas:count"), ("stage", stage)): 2 for stage in STAGES
    }
    assert scraper.value("whisper:rtfx:rate1m") > 1
    assert scraper.value("whisper:tokens_per_second:rate1m") > 1
    assert scraper.value("whisper:requests_failed:ratio5m") == 0
    assert 0 < scraper.value("whisper:request_seconds:p50_5m") < 60
    dims = load("embedded:base").dims
    windows = scraper.value('whisper:stage_windows:rate1m{stage="encoder",outcome="done"}')
    flops = scraper.value('whisper:stage_flops:rate1m{stage="encoder"}')
    assert flops == pytest.approx(windows * work.encoder_operations(dims), rel=0.2)
    for stage in STAGES:
        assert scraper.value(f'whisper:stage_latency_seconds:p99_5m{{stage="{stage}"}}') > 0
        assert scraper.value(f'whisper:stage_batch_windows:mean1m{{stage="{stage}"}}') >= 1


def test_a_killed_replica_shows_as_retries_and_its_gauges_go_away(
    scraper: Prometheus, application: str, shared_audio: Path
) -> None:
    long = shared_audio / "synth_long" / "piper-modern1.mp3"
    retries = 'sum(ray_whisper_stage_retries_total{stage="decoder",reason="replica_died"})'
    replicas = 'count(ray_whisper_stage_busy{stage="decoder"})'
    before = scraper.value(retries)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(transcribe, application, long)
        deadline = time.monotonic() + 60
        while occupancy("decoder").running < 4:  # which two replicas share
            assert time.monotonic() < deadline, "no windows ever ran"
            time.sleep(0.05)
        os.kill(pids("decoder")[0], signal.SIGKILL)
        assert request.result().status_code == 200
    deadline = time.monotonic() + 120
    ever = 'count(count_over_time(ray_whisper_stage_busy{stage="decoder"}[1h]))'
    while not (scraper.value(retries) > before and scraper.value(replicas) == 2 and scraper.value(ever) >= 3):
        now = [scraper.value(expression) for expression in (retries, replicas, ever)]
        assert time.monotonic() < deadline, f"retries, replicas now, and ever: {now}"
        time.sleep(0.3)
