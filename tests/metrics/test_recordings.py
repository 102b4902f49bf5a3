"""Recordings of the metrics port under load, asked through a real Prometheus: what each shows must hang together."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from loadtest.recording import Point, Recorder, openmetrics, read
from tests.metrics.replayed import Recording, recording_rules

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
    """Rules over a GPU's metrics want a recording of a GPU, those of scaling one of a load that was scaled."""
    of_gpus = ("ray_whisper_gpu", "dram", "tensor", 'kind!="cpu_busy"')
    empty = [
        name
        for name, expression in recording_rules().items()
        if "whisper:scaling_" not in name
        and (recording.of_gpus or not any(part in expression for part in of_gpus))
        and not recording.has(name)
    ]
    assert empty == []


def test_shares_are_shares_and_work_was_seen(recording: Recording) -> None:
    for metric in ("sm_utilization", "stage_busy", "stage_fill", "stage_saturation"):
        assert all(0 <= value <= 1 for value in recording.over("max_over_time", f"ray_whisper_{metric}"))
    for stage in ("encoder", "decoder"):
        assert max(recording.over("max_over_time", f'ray_whisper_stage_busy{{stage="{stage}"}}')) > 0.3


def test_a_gpus_readings_are_possible(recording: Recording) -> None:
    if not recording.of_gpus:
        pytest.skip("no GPU was recorded")
    assert max(recording.over("max_over_time", 'ray_whisper_sm_utilization{kind="gpm"}')) > 0.3
    assert 100 < max(recording.over("max_over_time", "ray_whisper_gpu_power_watts")) < 1500
    used = recording.over("max_over_time", "ray_whisper_gpu_memory_used_bytes")
    assert 2**30 < max(used) <= max(recording.over("max_over_time", "ray_whisper_gpu_memory_total_bytes"))
    assert max(recording.over("max_over_time", "ray_whisper_dram_bytes_per_second")) > 1e11
    assert all(0 < value <= 1 for value in recording.over("max_over_time", "ray_whisper_stage_gpu_share"))
