"""The readings of ``serve_app.scaling`` under load on one GPU, beside nvidia-smi's, in one process without Ray::

    python -m loadtest.gpu.metrics --seconds 48 --json gpu-metrics.json --plot gpu-metrics.png

and as a user without rights, from a folder that it may read, with one that it may write::

    setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/tmp WHISPER_SERVE_KERNEL_CACHE=/tmp/kernels-nobody \\
        .venv/bin/python -m loadtest.gpu.metrics --json /tmp/gpu-metrics-nobody.json

Four phases of the same length: nothing; full batches of the encoder; full steps of the decoder; the engine as a whole.
Meanwhile ``GpuReader`` and ``StageMeter`` are read once a second, and `nvidia-smi dmon` runs beside. The means of each
phase must agree and lie in their ranges (``loadtest.gpu.readings``). The compute throughput, which is the engine's own
count, is held against the work that was done by the wall clock, and against what the Tensor Cores could do in the time
in which they were active.

Ends with status 1 where a reading is missing, disagrees or is out of its range; with 2 where nothing can be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pynvml
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loadtest import report
from loadtest.gpu.engine import ENCODER_BATCH, SLOTS, Engine
from loadtest.gpu.nvidia_smi import Monitor, NvidiaSmiFailed, query
from loadtest.gpu.readings import PHASES, RANGES, TOLERANCES, Compared, Phase, Reading, Result, compare, failures
from loadtest.gpu.work import MODELS, WINDOW_S, random_log_mel, random_weights
from serve_app.engine import work
from serve_app.engine.checkpoint import Dims
from serve_app.engine.options import DecodeOptions
from serve_app.engine.slots import SlotTask
from serve_app.scaling.nvml import GpuReader, GpuSample
from serve_app.scaling.signals import Observer, Period, StageMeter
from serve_app.stages.ring import gpu_of

PEAK_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096}
"""Dense FP16 operations of one multiprocessor in a clock, by compute capability."""


class NothingToMeasure(Exception):
    """There is no GPU, or it cannot be read at all; the message says why."""


# ---- the load ----


class Load:
    """The engine's work, piece by piece. Every piece tells the meter what it did, and ends with the GPU's own end."""

    def __init__(self, dims: Dims, device: torch.device, windows: int, meter: StageMeter):
        self.dims, self.device, self.meter = dims, device, meter
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.engine = Engine()
        self.engine.load(dims, random_weights(dims, device, dtype), device)
        self.log_mel = random_log_mel(windows, dims, device, dtype)
        self.encoded = self.engine.encoder(self.log_mel[:ENCODER_BATCH])
        self._of_encoder = work.encoder_operations(dims)
        self._of_step = work.step_operations(dims)

    def idle(self, phase: Phase, end: float) -> None:
        time.sleep(max(0.0, end - time.time()))

    def run_encoder(self, phase: Phase, end: float) -> None:
        batch = self.log_mel[:ENCODER_BATCH]
        while time.time() < end:
            self._encode(batch)
            self._count(phase, len(batch), len(batch) * self._of_encoder)

    def run_decoder(self, phase: Phase, end: float) -> None:
        """Steps of as many slots as there are windows, each from its start to its 128 tokens, again and again."""
        try:
            while time.time() < end:
                states = [self.encoded[i % len(self.encoded)] for i in range(len(self.log_mel))]
                self._admit(states)
                self._decode(phase, end)
        finally:
            self.engine.slots.cancel(self.engine.slots.window_ids)
            self.engine.slots.read()

    def run_engine(self, phase: Phase, end: float) -> None:
        while time.time() < end:
            for batch in self.log_mel.split(ENCODER_BATCH):
                states = self._encode(batch)
                self._count(phase, 0, len(batch) * self._of_encoder)
                self._admit(list(states))
            self._decode(phase, float("inf"))

    def _encode(self, batch: Tensor) -> Tensor:
        with self.meter.running():
            states = self.engine.encoder(batch)
            self._synchronize()
        self.meter.batch(len(batch), len(batch) / ENCODER_BATCH, len(batch) * self._of_encoder)
        return states

    def _admit(self, states: Sequence[Tensor]) -> None:
        options = DecodeOptions(language="en", timestamps=False)
        first = self.engine.slots.active
        tasks = [SlotTask(str(first + i), state, options) for i, state in enumerate(states)]
        with self.meter.running():
            self.engine.slots.admit(tasks)

    def _decode(self, phase: Phase, end: float) -> None:
        slots = self.engine.slots
        while (active := slots.active) and time.time() < end:
            before = slots.started
            with self.meter.running():
                finished = slots.step()
            steps = slots.started - before
            for _ in range(steps):
                self.meter.batch(active, active / SLOTS, active * self._of_step)
            tokens = sum(len(window.tokens) for _, window in finished)
            self.meter.ended("done", audio_s=len(finished) * WINDOW_S, tokens=tokens)
            phase.tokens += tokens
            self._count(phase, len(finished), steps * active * self._of_step)

    def _count(self, phase: Phase, windows: float, operations: float) -> None:
        phase.windows += windows
        phase.operations += operations

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- the measurement ----


class Sampler:
    """Ours, once a second: the GPU, and the meter."""

    def __init__(self, uuid: str | None, meter: StageMeter):
        self.readings: list[Reading] = []
        self._reader = None if uuid is None else GpuReader(uuid)
        self._meter = meter
        self._lock = threading.Lock()
        meter.take()
        self._observer = Observer(self.read)

    def stop(self) -> None:
        self._observer.stop()
        if self._reader is not None:
            self._reader.close()

    def read(self) -> None:
        """Once a second by itself, and at the edges of the phases."""
        with self._lock:
            sample = GpuSample(time.time()) if self._reader is None else self._reader.read()
            self.readings.append(reading(sample, self._meter.take()))


def reading(sample: GpuSample, period: Period) -> Reading:
    """(pure)"""
    values = {name: value for name, value in asdict(sample).items() if isinstance(value, int | float) and name != "at"}
    if sample.dram_bytes_per_s is not None:
        values["dram_bytes_per_s"] = sample.dram_bytes_per_s
    values |= {"busy": period.busy, "tflops": period.operations / period.seconds / 1e12}
    values |= {"rtfx": period.audio_s / period.seconds, "tokens_per_s": period.tokens / period.seconds}
    if period.gpu_share is not None:
        values["gpu_share"] = period.gpu_share
    return Reading(sample.at, period.seconds, values)


def measure(dims: Dims, device: torch.device, windows: int, seconds: float, announce: Callable[[str], None]) -> Result:
    """Runs the phases, ``seconds`` together, after loading and a warm-up."""
    result = Result()
    uuid = gpu_of(device)
    meter = StageMeter(on_gpu=device.type == "cuda")
    announce("loading …")
    load = Load(dims, device, windows, meter)
    works = {"idle": load.idle, "encoder": load.run_encoder, "decoder": load.run_decoder, "engine": load.run_engine}
    announce("warming up …")
    for name in PHASES[1:]:
        works[name](Phase(name, time.time()), time.time() + 0.5)
    monitor = None
    if uuid is not None:
        index = index_of(uuid)
        try:
            gpm = bool(pynvml.nvmlGpmQueryDeviceSupport(handle_of(uuid)).isSupportedDevice)
            monitor = Monitor(index, int(seconds) + 3, gpm=gpm)
        except (NvidiaSmiFailed, pynvml.NVMLError) as error:
            result.notes.append(str(error))
    sampler = Sampler(uuid, meter)
    try:
        for name in PHASES:
            announce(f"{name} …")
            sampler.read()
            phase = Phase(name, time.time())
            works[name](phase, phase.begin + seconds / len(PHASES))
            sampler.read()
            phase.end = time.time()
            result.phases.append(phase)
            if uuid is not None:
                try:
                    result.queried[name] = query(index)
                except NvidiaSmiFailed as error:
                    result.notes.append(str(error))
        sampler.stop()
        if monitor is not None:
            announce("waiting for nvidia-smi …")
            try:
                result.theirs = monitor.rows()
            except NvidiaSmiFailed as error:
                result.notes.append(str(error))
    finally:
        sampler.stop()
        if monitor is not None:
            monitor.stop()
    result.ours = sampler.readings
    return result


def handle_of(uuid: str) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def index_of(uuid: str) -> int:
    """nvidia-smi's number of the GPU. Raises NothingToMeasure."""
    try:
        return int(pynvml.nvmlDeviceGetIndex(handle_of(uuid)))
    except pynvml.NVMLError as error:
        raise NothingToMeasure(f"NVML does not know GPU {uuid}: {error}") from None


def peak_tflops(device: torch.device) -> float | None:
    """What the Tensor Cores do at most in dense FP16, at the highest clock; None where it is not known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    each = PEAK_PER_CLOCK.get((properties.major, properties.minor))
    if each is None:
        return None
    try:
        clock = pynvml.nvmlDeviceGetMaxClockInfo(handle_of(str(gpu_of(device))), pynvml.NVML_CLOCK_SM)
    except pynvml.NVMLError:
        return None
    return float(properties.multi_processor_count * each * clock * 1e6 / 1e12)


# ---- output ----


def show(console: Console, compared: Sequence[Compared]) -> None:
    table = Table(title="Means of each phase: ours, and a separate reading")
    for column in ("phase", "metric", "ours", "least – most", "separate", "agrees", "expected"):
        table.add_column(column, justify="left" if column in ("phase", "metric") else "right")
    said = {True: "yes", False: "[red]no[/]", None: "–"}
    for c in compared:
        scale, unit = (
            (2**30, " GiB") if c.metric == "memory_used" else (1e12, " TB/s") if "bytes" in c.metric else (1, "")
        )

        def text(value: float | None, scale: float = scale, unit: str = unit) -> str:
            return "–" if value is None else f"{value / scale:.4g}{unit}"

        expected = "–" if c.expected is None else f"{c.expected[0]:g} – {c.expected[1]:g}"
        if c.in_range is False:
            expected = f"[red]{expected}[/]"
        extent = "–" if c.low is None else f"{text(c.low)} – {text(c.high)}"
        table.add_row(c.phase, c.metric, text(c.ours), extent, text(c.theirs), said[c.agrees], expected)
    console.print(table)


def plot(result: Result, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begin = result.phases[0].begin
    panels = (
        ("sm_utilization", "busy share of multiprocessors", 1.0),
        ("dram_utilization", "share of memory bandwidth", 1.0),
        ("tensor_activity", "Tensor Cores active", 1.0),
        ("tflops", "TFLOP/s", 1.0),
        ("power_w", "power, W", 1.0),
        ("memory_used", "memory, GiB", 2.0**30),
    )
    figure, axes = pyplot.subplots(3, 2, figsize=(12, 9), sharex=True)
    for axis, (name, label, unit) in zip(axes.flat, panels, strict=True):
        for points, style, whose in ((result.ours, "-o", "ours"), (result.theirs, "x", "nvidia-smi")):
            known = [(p.at - begin, p.values[name] / unit) for p in points if name in p.values]
            if known:
                axis.plot(*zip(*known, strict=True), style, label=whose, markersize=4)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=8)
        for phase in result.phases:
            axis.axvline(phase.begin - begin, color="grey", linewidth=0.5)
            axis.text(phase.begin - begin, 1.01, phase.name, transform=axis.get_xaxis_transform(), fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def raw(result: Result, compared: Sequence[Compared], wrong: Sequence[str]) -> dict[str, Any]:
    return {
        "user": {"uid": os.getuid(), "root": os.getuid() == 0},
        "phases": [asdict(phase) | {"seconds": phase.seconds} for phase in result.phases],
        "compared": [asdict(c) for c in compared],
        "ours": [asdict(r) for r in result.ours],
        "nvidia_smi": [asdict(r) for r in result.theirs],
        "queried": result.queried,
        "notes": result.notes,
        "failures": list(wrong),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="large-v3", help="whose shapes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=48.0, help="of all phases, after loading (%(default)s)")
    parser.add_argument("--windows", type=int, default=SLOTS, help=f"at once, at most {SLOTS} (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the readings there")
    parser.add_argument("--plot", type=Path, help="draw them there (.png, .svg)")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    options = parser.parse_args(arguments)
    if not 1 <= options.windows <= SLOTS:
        parser.error(f"--windows is 1 to {SLOTS}")
    if options.seconds < len(PHASES):
        parser.error(f"--seconds is {len(PHASES)} at least")
    return options


def main(arguments: Sequence[str] | None = None, models: Mapping[str, Dims] = MODELS) -> int:
    options = parse(arguments)
    console = report.console()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that PyTorch can use; --device cpu runs the load alone", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    try:
        result = measure(
            models[options.model],
            device,
            options.windows,
            options.seconds,
            lambda text: console.print(text, highlight=False),
        )
    except NothingToMeasure as error:
        print(error, file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    expected = on_gpu and "H100 80GB" in torch.cuda.get_device_name(device) and options.model == "large-v3"
    compared = compare(result, peak=peak_tflops(device), ranges=RANGES if on_gpu else {})
    has_gpm = any("sm_occupancy" in r.values for r in result.ours)
    needed = [*TOLERANCES, "tflops"] if has_gpm else ["power_w", "memory_used", "tflops"]
    wrong = failures(compared, needed=needed if on_gpu else ["tflops"], ranged=expected)
    show(console, compared)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for line in wrong:
        console.print(f"not confirmed: {line}", style="red", highlight=False, markup=False)
    if options.json is not None:
        report.write_json(
            options.json, {"environment": report.environment(options.commit), **raw(result, compared, wrong)}
        )
    if options.plot is not None:
        name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
        plot(result, f"{options.model} on {name}, user {os.getuid()}", options.plot)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
