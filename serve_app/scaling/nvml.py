"""One GPU's state by NVML, read twice or more by one thread; what cannot be read is None, and the log says why, once.

Hopper and later count what their multiprocessors and memory do (GPM): a figure is of the time between two reads. Older
GPUs only tell in which share of the time some kernel of a process ran, and in which the memory was touched. ``kind``
says which of these a figure is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pynvml

logger = logging.getLogger(__name__)

T = TypeVar("T")

Kind = Literal["gpm", "process", "kernel_time"]
"""What a GPU's SM utilization is. gpm: the mean share of its multiprocessors that were busy. process: the share of the
time in which kernels of the processes on it ran, added up over the processes. kernel_time: the share of the time in
which any kernel ran. With the last two the DRAM utilization is the share of the time in which memory was touched."""

GPM_METRICS = {
    "sm_utilization": pynvml.NVML_GPM_METRIC_SM_UTIL,
    "sm_occupancy": pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
    "tensor_activity": pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    "dram_utilization": pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
}


@dataclass(frozen=True, slots=True)
class GpuSample:
    """at: Unix time. Shares are 0 to 1, of the time since the read before. dram_peak: bytes a second that the memory
    moves at most. memory: bytes, of all processes."""

    at: float
    kind: Kind | None = None
    sm_utilization: float | None = None
    sm_occupancy: float | None = None
    tensor_activity: float | None = None
    dram_utilization: float | None = None
    dram_peak: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None

    @property
    def dram_bytes_per_s(self) -> float | None:
        """Traffic of the memory; None where only the time is known in which it was touched."""
        if self.kind != "gpm" or self.dram_utilization is None or self.dram_peak is None:
            return None
        return self.dram_utilization * self.dram_peak


class GpuReader:
    """Reads the GPU with a UUID (as PyTorch gives it, without ``GPU-``). For one thread."""

    def __init__(self, uuid: str):
        self._uuid = uuid
        self._told: set[str] = set()
        self._samples: list[Any] = []  # GPM's: the one before and the one to be filled
        self._seen_us = time.time_ns() // 1000  # of processes' samples
        self._device = self._tried("the device", lambda: _device(uuid))
        if self._device is not None:
            self._tried("GPM", self._begin_gpm)
        self._dram_peak = self._tried("the memory's clock and width", self._read_dram_peak)

    def read(self) -> GpuSample:
        """The state now, with shares since the last read, or since the reader was made."""
        at = time.time()
        if self._device is None:
            return GpuSample(at)
        memory = self._tried("memory", self._read_memory)
        milliwatts = self._tried("power", lambda: pynvml.nvmlDeviceGetPowerUsage(self._device))
        sensor = pynvml.NVML_TEMPERATURE_GPU
        celsius = self._tried("temperature", lambda: pynvml.nvmlDeviceGetTemperature(self._device, sensor))
        kind, shares = self._read_shares()
        return GpuSample(
            at,
            kind,
            **shares,
            dram_peak=self._dram_peak,
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=None if celsius is None else float(celsius),
        )

    def close(self) -> None:
        for sample in self._samples:
            pynvml.nvmlGpmSampleFree(sample)
        self._samples = []

    def _read_shares(self) -> tuple[Kind | None, dict[str, float | None]]:
        if self._samples:
            gpm = self._tried("GPM", self._read_gpm)
            return ("gpm" if gpm else None), gpm or {}
        rates = self._tried("utilization", lambda: pynvml.nvmlDeviceGetUtilizationRates(self._device))
        if rates is None:
            return None, {}
        processes = self._tried("processes' utilization", self._read_processes)
        sm = rates.gpu / 100 if processes is None else processes
        kind: Kind = "kernel_time" if processes is None else "process"
        return kind, {"sm_utilization": sm, "dram_utilization": rates.memory / 100}

    def _begin_gpm(self) -> None:
        if not pynvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice:
            logger.info("GPU %s does not count what its multiprocessors do (GPM); plain counters are read", self._uuid)
            return
        samples = [pynvml.nvmlGpmSampleAlloc() for _ in range(2)]
        try:
            pynvml.nvmlGpmSampleGet(self._device, samples[0])
        except pynvml.NVMLError:
            for sample in samples:
                pynvml.nvmlGpmSampleFree(sample)
            raise
        self._samples = samples

    def _read_gpm(self) -> dict[str, float | None]:
        before, now = self._samples
        pynvml.nvmlGpmSampleGet(self._device, now)
        self._samples = [now, before]
        wanted = pynvml.c_nvmlGpmMetricsGet_t()
        wanted.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        wanted.sample1, wanted.sample2 = before, now
        wanted.numMetrics = len(GPM_METRICS)
        for place, metric in enumerate(GPM_METRICS.values()):
            wanted.metrics[place].metricId = metric
        pynvml.nvmlGpmMetricsGet(wanted)
        found = [wanted.metrics[place] for place in range(len(GPM_METRICS))]
        return {
            name: metric.value / 100 if metric.nvmlReturn == pynvml.NVML_SUCCESS else None
            for name, metric in zip(GPM_METRICS, found, strict=True)
        }

    def _read_processes(self) -> float:
        now = time.time_ns() // 1000
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(self._device, self._seen_us)
        except pynvml.NVMLError_NotFound:  # no process ran since then
            samples = []
        since, self._seen_us = self._seen_us, now
        return processes_utilization(((s.timeStamp, s.pid, s.smUtil) for s in samples), since)

    def _read_memory(self) -> Any:
        # the second version leaves out what the driver keeps for itself, as nvidia-smi does
        return pynvml.nvmlDeviceGetMemoryInfo(self._device, version=pynvml.nvmlMemory_v2)

    def _read_dram_peak(self) -> float | None:
        if self._device is None:
            return None
        megahertz = pynvml.nvmlDeviceGetMaxClockInfo(self._device, pynvml.NVML_CLOCK_MEM)
        bits = pynvml.nvmlDeviceGetMemoryBusWidth(self._device)
        return float(2 * megahertz * 1e6 * bits / 8)  # two transfers a clock

    def _tried(self, what: str, read: Callable[[], T]) -> T | None:
        """What a read gives; None, and a line in the log the first time, where NVML refuses it."""
        try:
            return read()
        except pynvml.NVMLError as error:
            if what not in self._told:
                self._told.add(what)
                logger.warning("GPU %s: NVML cannot read %s: %s", self._uuid, what, error)
            return None


def processes_utilization(samples: Iterable[tuple[int, int, int]], since: int) -> float:
    """Utilization of all processes together, 0 to 1, from samples (time stamp, process, per cent) (pure). A process's
    last sample counts, if it is later than ``since``: the driver's are older where nothing ran."""
    latest: dict[int, tuple[int, int]] = {}
    for stamp, process, percent in samples:
        if stamp > since and stamp >= latest.get(process, (0, 0))[0]:
            latest[process] = stamp, percent
    return min(1.0, sum(percent for _, percent in latest.values()) / 100)


def _device(uuid: str) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
