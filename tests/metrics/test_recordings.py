"""Recordings of the metrics port under load, asked through a real Prometheus: what each shows must hang together."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from loadtest.recording import PREFIX, Point, Recorder, openmetrics, read
from tests.prometheus import RULES, Prometheus, program, prometheus

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.om.gz"))

PORT = """\
# HELP ray_whisper_requests_total Recordings.
# TYPE ray_whisper_requests_total counter
ray_whisper_requests_total{Component="core_worker",WorkerId="0123456789abcdef",outcome="done",otel_scope_name="x"} 7.0
# TYPE ray_tasks gauge
ray_tasks{State="RUNNING"} 3.0
# TYPE ray_whisper_stage_busy gauge
ray_whisper_stage_busy{WorkerId="0123456789abcdef",stage="encoder",replica="a"} 0.25
"""


def test_the_applications_samples_are_kept_without_rays_labels() -> None:
    requests, busy = read(PORT, 12.5)
    worker = ("WorkerId", "01234567")
    assert requests == Point(
        "ray_whisper_requests", "counter", "ray_whisper_requests_total", (worker, ("outcome", "done")), 7.0, 12.5
    )
    assert busy.labels == (worker, ("replica", "a"), ("stage", "encoder"))


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(1, 10**9)), unique=True))
def test_what_is_written_is_what_was_heard(heard: list[tuple[str, int]]) -> None:
    points = [
        Point("ray_whisper_x", "gauge", "ray_whisper_x", (("a", text),), float(at % 7), float(at)) for text, at in heard
    ]
    written = openmetrics(points)
    read_back = [s for family in text_string_to_metric_families(written) for s in family.samples]
    assert sorted((s.labels["a"], float(s.timestamp), s.value) for s in read_back if s.timestamp) == sorted(
        (point.labels[0][1], point.at, point.value) for point in points
    )


def test_a_port_that_does_not_answer_leaves_nothing_to_write(tmp_path: Path) -> None:
    recorder = Recorder(["127.0.0.1:1"], period_s=0.01)
    recorder.stop()
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:1"):
        recorder.write(tmp_path / "nothing.om.gz")


class Recording:
    """A recording in a Prometheus' database. begin, end: Unix time of its first and last sample."""

    def __init__(self, server: Prometheus, begin: float, end: float):
        self.server, self.begin, self.end = server, begin, end

    def value(self, expression: str) -> float:
        """At the end."""
        (value,) = self.server.query(expression, at=self.end).values()
        return value

    def over(self, function: str, metric: str) -> list[float]:
        """``max_over_time`` or another, of every series."""
        window = round(self.end - self.begin) + 1
        return list(self.server.query(f"{function}({metric}[{window}s])", at=self.end).values())


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda path: path.name)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("recording")
    text = gzip.decompress(request.param.read_bytes()).decode()
    (folder / "recording.om").write_text(text)
    command = [program("promtool"), "tsdb", "create-blocks-from", "openmetrics", "recording.om", "data"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    stamps = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(PREFIX)]
    with prometheus(folder, targets=[]) as server:
        yield Recording(server, min(stamps), max(stamps))


def test_every_stage_did_every_window(recording: Recording) -> None:
    done = {
        stage: recording.value(f'sum(ray_whisper_stage_windows_total{{stage="{stage}",outcome="done"}})')
        for stage in ("features", "encoder", "decoder")
    }
    assert len(set(done.values())) == 1, done
    assert done["encoder"] > 0
    assert recording.value('sum(ray_whisper_requests_total{outcome="done"})') > 0
    assert recording.value('sum(ray_whisper_requests_total{outcome!="done"})') == 0
    assert recording.value("sum(ray_whisper_stage_retries_total) + sum(ray_whisper_stage_errors_total)") == 0


def test_every_rule_of_its_kind_has_a_value(recording: Recording) -> None:
    """Rules over a GPU's metrics want a recording of a GPU."""
    on_gpu = bool(recording.server.query("ray_whisper_gpu_power_watts", at=recording.end))
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    of_gpus = {rule["record"] for rule in rules if "ray_whisper_gpu" in rule["expr"]}
    of_gpus |= {rule["record"] for rule in rules if "dram" in rule["expr"] or "tensor" in rule["expr"]}
    window = "5m"  # whatever its length, the recording is inside
    for rule in rules:
        if on_gpu or rule["record"] not in of_gpus:
            expression = rule["expr"].replace("[1m]", f"[{window}]").replace("[5m]", f"[{window}]")
            assert recording.server.query(expression, at=recording.end), rule["record"]


def test_shares_are_shares_and_work_was_seen(recording: Recording) -> None:
    for metric in ("sm_utilization", "stage_busy", "stage_fill", "stage_saturation"):
        assert all(0 <= value <= 1 for value in recording.over("max_over_time", f"ray_whisper_{metric}"))
    for stage in ("encoder", "decoder"):
        assert max(recording.over("max_over_time", f'ray_whisper_stage_busy{{stage="{stage}"}}')) > 0.3


def test_a_gpus_readings_are_possible(recording: Recording) -> None:
    if not recording.server.query("ray_whisper_gpu_power_watts", at=recording.end):
        pytest.skip("no GPU was recorded")
    assert max(recording.over("max_over_time", 'ray_whisper_sm_utilization{kind="gpm"}')) > 0.3
    assert 100 < max(recording.over("max_over_time", "ray_whisper_gpu_power_watts")) < 1500
    used = recording.over("max_over_time", "ray_whisper_gpu_memory_used_bytes")
    assert 2**30 < max(used) <= max(recording.over("max_over_time", "ray_whisper_gpu_memory_total_bytes"))
    assert max(recording.over("max_over_time", "ray_whisper_dram_bytes_per_second")) > 1e11
    assert all(0 < value <= 1 for value in recording.over("max_over_time", "ray_whisper_stage_gpu_share"))
