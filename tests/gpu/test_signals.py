"""Readings of a real GPU."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from serve_app.scaling.nvml import GpuReader
from serve_app.scaling.signals import GpuClock, StageMeter, measure_saturation
from serve_app.stages.ring import gpu_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.fixture
def uuid() -> str:
    found = gpu_of(torch.device("cuda"))
    assert found is not None
    return found


@pytest.fixture
def reader(uuid: str) -> Iterator[GpuReader]:
    reader = GpuReader(uuid)
    yield reader
    reader.close()


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(8192, 8192, device="cuda", dtype=torch.float16)


def work(matrix: torch.Tensor, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()


@contextmanager
def kept_busy(run: Callable[[], None]) -> Iterator[None]:
    """Runs it again and again on a thread: the GPU's counts may lag some tenths of a second behind, so that what is to
    be read begins before and ends after the reading."""
    stopped = threading.Event()

    def loop() -> None:
        while not stopped.is_set():
            run()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        time.sleep(0.5)
        yield
    finally:
        stopped.set()
        thread.join()


def test_memory_power_and_temperature_are_read(reader: GpuReader) -> None:
    held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    sample = reader.read()
    free, total = torch.cuda.mem_get_info()
    assert sample.memory_total is not None
    assert sample.memory_used is not None
    assert sample.memory_total == pytest.approx(total, rel=0.05)
    assert sample.memory_used == pytest.approx(total - free, abs=2**30)
    assert sample.memory_used > held.numel()
    assert sample.power_w is not None
    assert 5 < sample.power_w < 2000
    assert sample.temperature_c is not None
    assert 5 < sample.temperature_c < 110


@pytest.mark.skipif(not HOPPER, reason="counts come with Hopper")
def test_products_keep_the_multiprocessors_busy_and_idling_does_not(reader: GpuReader, matrix: torch.Tensor) -> None:
    work(matrix, 0.5)
    time.sleep(0.5)
    reader.read()
    time.sleep(1.0)
    idle = reader.read()
    with kept_busy(lambda: work(matrix, 0.05)):
        reader.read()
        time.sleep(1.0)
        busy = reader.read()
    assert (idle.kind, busy.kind) == ("gpm", "gpm")
    assert idle.sm_utilization is not None
    assert busy.sm_utilization is not None
    assert idle.sm_utilization < 0.2 < 0.8 < busy.sm_utilization <= 1.0
    assert busy.tensor_activity is not None
    assert busy.tensor_activity > 0.4
    assert busy.sm_occupancy is not None
    assert 0 < busy.sm_occupancy < 1


@pytest.mark.skipif(not HOPPER, reason="counts come with Hopper")
def test_traffic_is_what_a_copy_moves(reader: GpuReader) -> None:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates: list[float] = []  # read and written

    def copy() -> None:
        begin = time.monotonic()
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()
        rates.append(10 * 2 * source.numel() / (time.monotonic() - begin))

    with kept_busy(copy):
        reader.read()
        time.sleep(1.0)
        sample = reader.read()
    assert sample.dram_bytes_per_s is not None
    assert sample.dram_bytes_per_s == pytest.approx(statistics.median(rates), rel=0.15)


def test_the_clock_tells_what_held_the_gpu_and_never_waits() -> None:
    clock = GpuClock()
    cycles = 10**9  # about half a second
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    with clock.span():
        torch.cuda._sleep(cycles)
    end.record()
    before = time.monotonic()
    assert clock.take() == 0.0  # it is still running
    assert time.monotonic() - before < 0.1
    torch.cuda.synchronize()
    assert clock.take() == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.05)
    assert clock.take() == 0.0


def test_a_meters_share_is_of_the_time_that_its_work_held_the_gpu(matrix: torch.Tensor) -> None:
    work(matrix, 0.2)
    meter = StageMeter(on_gpu=True)
    meter.take()
    with meter.running():
        work(matrix, 0.5)
    time.sleep(0.5)
    period = meter.take()
    assert period.gpu_share is not None
    assert period.gpu_share == pytest.approx(0.5, abs=0.1)
    assert period.busy == pytest.approx(0.5, abs=0.1)


def test_saturation_is_what_full_batches_reach(uuid: str, matrix: torch.Tensor) -> None:
    def run() -> float:
        work(matrix, 0.05)
        return 30.0

    saturation, rate = measure_saturation(uuid, run, 1.0)
    assert 0.5 < saturation <= 1.0
    assert rate == pytest.approx(30 / 0.05, rel=0.2)
