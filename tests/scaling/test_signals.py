from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scaling.nvml import GpuReader, GpuSample, processes_utilization
from serve_app.scaling.signals import Arrivals, Observer, Rate, StageMeter, alone_on

UUID = "00000000-1111-2222-3333-444444444444"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_arrivals_are_those_of_the_last_second(clock: Clock) -> None:
    arrivals = Arrivals(clock)
    assert arrivals.last_second() == 0.0
    for _ in range(4):
        arrivals.add(30.0)
        clock.now += 0.3
    assert arrivals.last_second() == 90.0
    clock.now += 1.0
    assert arrivals.last_second() == 0.0


def run(meter: StageMeter, clock: Clock, seconds: float, windows: int = 1, fill: float = 1.0) -> None:
    with meter.running():
        clock.now += seconds
    meter.batch(windows, fill, 10.0 * windows)


def test_a_period_adds_up_what_happened_in_it(clock: Clock) -> None:
    meter = StageMeter(on_gpu=False, clock=clock)
    run(meter, clock, 0.25, windows=4, fill=1.0)
    run(meter, clock, 0.25, windows=2, fill=0.5)
    meter.waited(0.1)
    meter.ended("done", audio_s=20.0, tokens=7)
    meter.ended("failed")
    clock.now += 0.5
    period = meter.take()
    assert period.seconds == pytest.approx(1.0)
    assert period.busy == pytest.approx(0.5)
    assert period.gpu_share is None
    assert period.fill == pytest.approx(0.75)
    assert period.batches == Counter({4: 1, 2: 1})
    assert period.operations == 60
    assert (period.audio_s, period.tokens) == (20.0, 7)
    assert period.outcomes == {"done": 1, "failed": 1}
    assert period.waits == [0.1]
    assert period.rate == pytest.approx(40.0)
    clock.now += 1.0
    idle = meter.take()
    assert (idle.busy, idle.fill, idle.operations, idle.waits, idle.batches) == (0, 0, 0, [], Counter())
    assert idle.rate == pytest.approx(40.0)  # idling forgets nothing


def test_a_batch_that_still_runs_is_busy_in_every_period_that_it_touches(clock: Clock) -> None:
    meter = StageMeter(on_gpu=False, clock=clock)
    clock.now += 0.5
    with meter.running():
        clock.now += 0.5
        assert meter.take().busy == pytest.approx(0.5)
        clock.now += 1.0
        assert meter.take().busy == pytest.approx(1.0)
        clock.now += 0.25
    clock.now += 0.75
    assert meter.take().busy == pytest.approx(0.25)


def test_work_that_raises_counts_as_well(clock: Clock) -> None:
    meter = StageMeter(on_gpu=False, clock=clock)

    def fail() -> None:
        with meter.running():
            clock.now += 1.0
            raise ValueError("as ordered")

    with pytest.raises(ValueError, match="as ordered"):
        fail()
    assert meter.take().busy == pytest.approx(1.0)


@given(st.lists(st.tuples(st.sampled_from(["run", "idle", "take"]), st.floats(0.01, 5)), max_size=40))
def test_busy_time_is_neither_lost_nor_invented(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    meter = StageMeter(on_gpu=False, clock=clock)
    ran = counted = 0.0
    for what, seconds in [*steps, ("idle", 0.01), ("take", 0.0)]:
        if what == "run":
            run(meter, clock, seconds)
            ran += seconds
        elif what == "idle":
            clock.now += seconds
        else:
            period = meter.take()
            assert 0 <= period.busy <= 1
            counted += period.busy * period.seconds
    assert counted == pytest.approx(ran, abs=1e-4)


def test_what_is_finished_a_second_is_smooth_and_right_in_the_long_run(clock: Clock) -> None:
    """Windows of 30 s end in lumps, one every other second."""
    meter = StageMeter(on_gpu=False, clock=clock)
    seen = []
    for second in range(60):
        if second % 2:
            meter.ended("done", audio_s=30.0)
        clock.now += 1.0
        seen.append(meter.take().done_s)
    assert all(10 < done < 20 for done in seen[-20:])
    assert sum(seen[-20:]) / 20 == pytest.approx(15, rel=0.02)


@given(st.floats(1, 1000), st.floats(0.05, 1.0))
def test_the_rate_finds_what_the_work_does(speed: float, busy: float) -> None:
    rate = Rate()
    assert rate.update(0.0, 0.0, 0.0) is None
    for _ in range(10):
        found = rate.update(busy * speed, busy, 1.0)
    assert found == pytest.approx(speed)


def test_the_rate_follows_full_batches_within_a_minute_and_hardly_empty_ones() -> None:
    rate = Rate(first=100.0)
    for _ in range(60):
        found = rate.update(10.0, 1.0, 0.02)  # a window at a time is slow, and says little
    assert found is not None
    assert found > 30
    for _ in range(60):
        found = rate.update(200.0, 1.0, 1.0)
    assert found == pytest.approx(200, rel=0.1)


def test_many_threads_report_to_one_meter() -> None:
    meter = StageMeter(on_gpu=False)

    def report() -> None:
        for _ in range(1000):
            meter.ended("done", audio_s=1.0, tokens=2)
            meter.waited(0.5)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    audio = tokens = done = waits = 0.0
    while any(thread.is_alive() for thread in threads) or not done:
        period = meter.take()
        audio, tokens = audio + period.audio_s, tokens + period.tokens
        done, waits = done + period.outcomes["done"], waits + len(period.waits)
    period = meter.take()
    audio, tokens = audio + period.audio_s, tokens + period.tokens
    done, waits = done + period.outcomes["done"], waits + len(period.waits)
    assert (audio, tokens, done, waits) == (4000, 8000, 4000, 4000)


def test_stages_that_start_on_one_gpu_measure_it_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside, most = 0, 0
    lock = threading.Lock()

    def measure() -> None:
        nonlocal inside, most
        with alone_on(UUID):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert most == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"whisper-serve-{os.getuid()}-{UUID}.lock"]


def test_an_observer_goes_on_after_an_error_and_tells_of_it_once(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def observe() -> None:
        calls.append(time.monotonic())
        raise RuntimeError("the same as ever")

    with caplog.at_level(logging.ERROR):
        observer = Observer(observe, period_s=0.01)
        deadline = time.monotonic() + 10
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        observer.stop()
    assert len(calls) >= 5
    number = len(calls)
    time.sleep(0.05)
    assert len(calls) == number
    assert len(caplog.records) == 1


# ---- NVML ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_read_and_the_reason_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reader = GpuReader(UUID)
        samples = [reader.read() for _ in range(3)]
        reader.close()
    assert all(sample == GpuSample(sample.at) for sample in samples)
    assert len([record for record in caplog.records if UUID in record.getMessage()]) == 1


def test_traffic_is_known_where_the_bandwidth_is_counted() -> None:
    assert GpuSample(0.0, "gpm", dram_utilization=0.5, dram_peak=3e12).dram_bytes_per_s == 1.5e12
    assert GpuSample(0.0, "process", dram_utilization=0.5, dram_peak=3e12).dram_bytes_per_s is None
    assert GpuSample(0.0, "gpm", dram_utilization=None, dram_peak=3e12).dram_bytes_per_s is None


def test_processes_add_up_by_their_last_samples() -> None:
    samples = [(110, 1, 90), (120, 1, 30), (120, 2, 40), (90, 3, 100)]
    assert processes_utilization(samples, since=100) == pytest.approx(0.7)
    assert processes_utilization([], since=0) == 0.0
    assert processes_utilization([(1, 1, 80), (1, 2, 80)], since=0) == 1.0


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 5), st.integers(0, 100))))
def test_a_utilization_is_a_share_whatever_the_order(samples: list[tuple[int, int, int]]) -> None:
    unique = list({(stamp, process): (stamp, process, percent) for stamp, process, percent in samples}.values())
    found = processes_utilization(unique, since=100)
    assert 0 <= found <= 1
    assert processes_utilization(reversed(unique), since=100) == found


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "observer"]
