"""The comparisons of the published account that this project implements, each as a ratio of one run on one GPU::

    python -m loadtest.gpu.account --json account.json
    python -m loadtest.gpu.account --parts sectors,python         # only some

precision   the whole engine in FP16 and in FP32 without TF32: throughput and memory (processes of their own)
sectors     sectors of global memory that the two plain attention kernels read, by Nsight Compute
python      the first of them beside plain Python and NumPy
mapped      log-mel from samples in mapped host memory, and from a copy
graphs      a decoding step with its CUDA Graph, and launched kernel by kernel
buffering   the next batch's input uploaded while one is computed, and one after the other

Ends with status 1 where a goal is missed or a part has no figure.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.encoder_attention import SIMPLE_VARIANTS, reference, simple_attention
from kernels.log_mel import WINDOW_SAMPLES, LogMelKernel, pack
from kernels.next_token import Field, new_state
from loadtest import report
from loadtest.gpu.engine import Engine
from loadtest.gpu.report import alike
from loadtest.gpu.run import Run, run
from loadtest.gpu.timing import graph_milliseconds, milliseconds
from loadtest.gpu.work import MODELS, Task, random_log_mel, random_weights
from loadtest.gpu.worker import Job
from serve_app.engine.checkpoint import Dims

Array = npt.NDArray[Any]

# the account's figures, as ratios: 62 % fewer, ×27, ×3.8; its 45 % of memory saved
GOAL_SECTORS = 1 / (1 - 0.62)
GOAL_PYTHON = 27.0
GOAL_THROUGHPUT = 3.8
GOAL_MEMORY = 1 / 0.55

SYSTEMS = {"FP16": "loadtest.gpu.engine:Engine", "FP32": "loadtest.gpu.engine:EngineFloat32"}
NCU_SECONDS = 300
SECTORS = {
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "sectors that loads of global memory ask for",
    "lts__t_sectors_op_read.sum": "sectors read from the L2 cache",
}
LAUNCH = "from loadtest.gpu.account import launch_plain; launch_plain()"
TINY, WINDOW = (1, 64, 6), (1, 1500, 6)
"""Batch, positions and heads: one that plain Python can do, and one window of the tiny model."""
QUERIES = 4  # of a window that plain Python computes: each of its 9,000 is the same work
LOG_MEL_WINDOWS = 64
STEP_SIZES = (1, 32, 256)
MIDDLE = 64  # a step's position, as in the middle of 128 tokens
BATCHES = 6  # one after the other, to be buffered


class NotMeasured(Exception):
    """A part has no figure here; the message says why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same work done in two ways. ``ours`` and ``other`` are in ``unit``; the larger is the better one where
    ``more_is_better``. goal: at least so many times as good."""

    part: str
    what: str
    beside: str
    unit: str
    ours: float
    other: float
    goal: float | None = None
    more_is_better: bool = False

    @property
    def times(self) -> float:
        return self.ours / self.other if self.more_is_better else self.other / self.ours

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.times >= self.goal


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured where. windows: together, in the comparison of precisions. seconds: for each of its systems."""

    dims: Dims
    device: str
    windows: int
    seconds: float


# ---- precision ----


def precision(setting: Setting) -> list[Comparison]:
    """Each in a process of its own, so that neither finds the other's memory taken."""
    runs = {
        name: run(
            "",
            name,
            Job(path, setting.dims, (setting.windows,), repeats=2, seconds=setting.seconds, device=setting.device),
        )
        for name, path in SYSTEMS.items()
    }
    return compared_precision(runs, setting.windows)


def compared_precision(runs: dict[str, Run], windows: int) -> list[Comparison]:
    """Of the runs of both precisions (pure)."""
    half, single = (runs[name] for name in SYSTEMS)
    ours, other = half.at(windows), single.at(windows)
    if ours is None or other is None:
        raise NotMeasured("; ".join(f"{r.name}: {r.error or r.left_out or 'no figure'}" for r in (half, single)))
    same = alike(half.sizes, single.sizes)
    what = f"engine in FP16, {windows} windows" + (f", {same:.0%} of the tokens alike" if same is not None else "")
    speed = Comparison("precision", what, "FP32", "RTFx", ours.rtfx, other.rtfx, GOAL_THROUGHPUT, more_is_better=True)
    if ours.memory_gib is None or other.memory_gib is None:
        return [speed]
    memory = Comparison("precision", what, "FP32", "GiB in use", ours.memory_gib, other.memory_gib, GOAL_MEMORY)
    return [speed, memory]


# ---- sectors ----


def sectors(setting: Setting) -> list[Comparison]:
    ncu = shutil.which("ncu")
    if ncu is None or setting.device != "cuda":
        raise NotMeasured("Nsight Compute (ncu) is not installed, or there is no GPU for it")
    done = subprocess.run(ncu_command(ncu), capture_output=True, text=True, timeout=NCU_SECONDS, check=False)
    try:
        return compared_sectors(done.stdout)
    except ValueError as error:
        words = " | ".join([*done.stdout.splitlines()[-3:], *done.stderr.splitlines()[-3:]])
        raise NotMeasured(f"ncu ended with status {done.returncode}: {error}: {words}") from None


def ncu_command(ncu: str) -> list[str]:
    """Counts for the plain kernels alone, with the GPU's clocks left as they are (pure)."""
    kernel = ["--kernel-name", "encoder_attention_simple"]
    return [
        ncu,
        "--csv",
        "--clock-control",
        "none",
        "--print-units",
        "base",
        *kernel,
        "--metrics",
        ",".join(SECTORS),
        sys.executable,
        "-c",
        LAUNCH,
    ]


def launch_plain() -> None:
    """One launch of each plain kernel, in the order of ``SIMPLE_VARIANTS``, checked: what ncu looks at."""
    qkv = _projections(WINDOW)
    wanted = reference(qkv.float(), WINDOW[2])
    for variant in SIMPLE_VARIANTS:
        torch.testing.assert_close(simple_attention(qkv, WINDOW[2], variant).float(), wanted, rtol=2e-3, atol=2e-3)


def read_ncu(text: str) -> list[dict[str, float]]:
    """ncu's CSV → by launch, in their order, metric → value (pure). Raises ValueError where it holds none."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("no table of metrics")
    launches: dict[int, dict[str, float]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        launches.setdefault(int(row["ID"]), {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [launches[i] for i in sorted(launches)]


def compared_sectors(text: str) -> list[Comparison]:
    """Of ncu's output (pure)."""
    launches = read_ncu(text)
    if len(launches) != len(SIMPLE_VARIANTS) or any(metric not in launch for launch in launches for metric in SECTORS):
        raise ValueError(f"{len(launches)} launches, not {len(SIMPLE_VARIANTS)} with every metric")
    by_variant = dict(zip(SIMPLE_VARIANTS, launches, strict=True))
    shared, each = by_variant["shared_keys"], by_variant["one_thread_a_score"]
    goals = dict.fromkeys(SECTORS, None) | {next(iter(SECTORS)): GOAL_SECTORS}
    return [
        Comparison("sectors", what, "each lane its own key", "sectors", shared[metric], each[metric], goals[metric])
        for metric, what in SECTORS.items()
    ]


# ---- plain Python ----


def python(setting: Setting) -> list[Comparison]:
    """The kernel's time is the GPU's alone: what goes to it and comes back is not counted."""
    _need_gpu(setting)
    rows = []
    for shape in (TINY, WINDOW):
        qkv = _projections(shape)
        array = qkv.float().cpu().numpy()
        ours = graph_milliseconds([partial(simple_attention, qkv, shape[2], "one_thread_a_score")])
        queries = shape[1] if shape == TINY else QUERIES
        slow = python_milliseconds(array, queries)
        name = f"plain Python (from {queries} of its {shape[1] * shape[2]} queries)"
        what = f"first attention kernel, {shape[0]} × {shape[1]} × {shape[2]} heads"
        rows.append(Comparison("python", what, name, "ms", ours, slow, GOAL_PYTHON))
        numpy_ms = _host_milliseconds(partial(numpy_attention, array), 20 if shape == TINY else 3)
        rows.append(Comparison("python", what, "NumPy, FP32", "ms", ours, numpy_ms))
    return rows


def python_milliseconds(qkv: Array, queries: int) -> float:
    """Time of plain Python for all heads of qkv [1, positions, 3, heads, 64], from that for so many of the first head's
    queries: each is the same work."""
    query, key, value = (qkv[0, :, i, 0].tolist() for i in range(3))
    begin = time.perf_counter()
    python_attention(query[:queries], key, value)
    return (time.perf_counter() - begin) * 1e3 / queries * int(qkv.shape[1] * qkv.shape[3])


def python_attention(
    query: Sequence[Sequence[float]], key: list[list[float]], value: list[list[float]]
) -> list[list[float]]:
    """Attention of one head, number by number."""
    result = []
    for q in query:
        scores = []
        for k in key:
            score = 0.0
            for a, b in zip(q, k, strict=True):
                score += a * b
            scores.append(score / 8)
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        total = [0.0] * len(q)
        for weight, v in zip(weights, value, strict=True):
            for i, x in enumerate(v):
                total[i] += weight * x
        result.append([x / sum(weights) for x in total])
    return result


def numpy_attention(qkv: Array) -> Array:
    """qkv [batch, positions, 3, heads, 64] → [batch, heads, positions, 64]."""
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)
    scores = query @ key.swapaxes(-1, -2) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = weights @ value / weights.sum(-1, keepdims=True)
    return result


def _host_milliseconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])


def _projections(shape: tuple[int, int, int]) -> Tensor:
    batch, positions, heads = shape
    return torch.randn(batch, positions, 3, heads, 64, device="cuda").half()


# ---- mapped host memory ----


def mapped(setting: Setting) -> list[Comparison]:
    _need_gpu(setting)
    device = torch.device(setting.device)
    kernel = LogMelKernel(setting.dims.n_mels, device)
    samples, offsets, lengths = pack(_noise(), pin_memory=True)
    offsets, lengths = offsets.to(device), lengths.to(device)
    out = kernel(samples, offsets, lengths, dtype=torch.float16)
    copied = torch.empty_like(samples, device=device)

    def in_place() -> None:
        kernel(samples, offsets, lengths, out, dtype=torch.float16)

    def staged() -> None:
        copied.copy_(samples, non_blocking=True)
        kernel(copied, offsets, lengths, out, dtype=torch.float16)

    what = f"log-mel of {LOG_MEL_WINDOWS} windows from mapped host memory"
    ours, other = (graph_milliseconds([work]) for work in (in_place, staged))
    return [Comparison("mapped", what, "copied first", "ms", ours, other)]


# ---- CUDA Graphs ----


@torch.inference_mode()
def graphs(setting: Setting) -> list[Comparison]:
    """On a CPU there are no graphs: both are the same then."""
    device, dims = torch.device(setting.device), setting.dims
    engine = _engine(setting)
    slots = engine.slots
    slots.decoder.states.normal_()
    state = new_state(Task.of(dims).prompt, position=MIDDLE, timestamps=False, temperature=0.0, seed=0)
    rows = []
    for size in STEP_SIZES:
        taken = []
        for step in (slots.advance, slots._step):
            slots.states[:size] = torch.tensor([state], dtype=torch.int32, device=device)
            taken.append(_stream_milliseconds(partial(step, size), device))
            slots.states[:, Field.FINISHED] = 1
        what = f"decoding step of {size} slots, one graph"
        rows.append(Comparison("graphs", what, "kernel by kernel", "ms", taken[0], taken[1]))
    return rows


# ---- double buffering ----


@torch.inference_mode()
def buffering(setting: Setting) -> list[Comparison]:
    _need_gpu(setting)
    device, dims = torch.device(setting.device), setting.dims
    encoder = _engine(setting).encoder
    rows = []
    for windows in (1, 16):
        log_mel = random_log_mel(windows, dims, device, torch.float16).cpu()
        rows.append(_buffered(f"encoder, batches of {windows}", log_mel, encoder, device))
    kernel = LogMelKernel(dims.n_mels, device)
    samples, offsets, lengths = pack(_noise())
    offsets, lengths = offsets.to(device), lengths.to(device)
    out = torch.empty(LOG_MEL_WINDOWS, dims.n_mels, 3000, device=device)

    def log_mel_kernel(given: Tensor) -> Tensor:
        return kernel(given, offsets, lengths, out)

    rows.append(_buffered(f"log-mel, batches of {LOG_MEL_WINDOWS}", samples, log_mel_kernel, device))
    return rows


def _buffered(what: str, batch: Tensor, compute: Callable[[Tensor], Tensor], device: torch.device) -> Comparison:
    pinned = [batch.pin_memory() for _ in range(BATCHES)]
    buffers = [torch.empty_like(batch, device=device) for _ in range(2)]
    upload = torch.cuda.Stream()
    ours, other = (
        _stream_milliseconds(partial(work, pinned, buffers, compute), device) / BATCHES
        for work in (partial(uploaded_meanwhile, upload), uploaded_before)
    )
    return Comparison("buffering", f"{what}, the next uploaded meanwhile", "uploaded before", "ms a batch", ours, other)


def uploaded_before(
    batches: Sequence[Tensor], buffers: Sequence[Tensor], compute: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Each batch is copied to the GPU, then computed."""
    return [compute(buffers[0].copy_(batch, non_blocking=True)) for batch in batches]


def uploaded_meanwhile(
    upload: torch.cuda.Stream,
    batches: Sequence[Tensor],
    buffers: Sequence[Tensor],
    compute: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The copies go through two buffers on a stream of their own, one batch ahead of the computation."""
    here, results = torch.cuda.current_stream(), []
    done: list[torch.cuda.Event] = []
    upload.wait_stream(here)
    for index, batch in enumerate(batches):
        buffer = buffers[index % 2]
        if index >= 2:
            upload.wait_event(done[index - 2])  # who computed with this buffer before
        with torch.cuda.stream(upload):
            buffer.copy_(batch, non_blocking=True)
        here.wait_stream(upload)
        results.append(compute(buffer))
        done.append(here.record_event())
    return results


# ---- all together ----


def _noise() -> list[Tensor]:
    """Windows of 30 s, int16."""
    return list((torch.randn(LOG_MEL_WINDOWS, WINDOW_SAMPLES) * 3000).to(torch.int16))


@lru_cache(maxsize=1)
def _engine(setting: Setting) -> Engine:
    device = torch.device(setting.device)
    engine = Engine()
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    engine.load(setting.dims, random_weights(setting.dims, device, dtype), device)
    return engine


def _stream_milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """With the host's launches, where the GPU waits for them."""
    return milliseconds(work) if device.type == "cuda" else _host_milliseconds(work, 5)


def _need_gpu(setting: Setting) -> None:
    if setting.device != "cuda":
        raise NotMeasured("needs an NVIDIA GPU")


PARTS: dict[str, Callable[[Setting], list[Comparison]]] = {
    # first those in processes of their own: this one has taken no memory of the GPU by then
    "precision": precision,
    "sectors": sectors,
    "python": python,
    "mapped": mapped,
    "graphs": graphs,
    "buffering": buffering,
}


def measure(
    setting: Setting, parts: Iterable[str], announce: Callable[[str], None]
) -> tuple[list[Comparison], dict[str, str]]:
    """The comparisons, and why parts have none."""
    found: list[Comparison] = []
    missing: dict[str, str] = {}
    for part in parts:
        announce(f"{part} …")
        try:
            found += PARTS[part](setting)
        except NotMeasured as error:
            missing[part] = str(error)
        except Exception as error:  # the other parts are measured all the same
            missing[part] = f"{type(error).__name__}: {error}"
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return found, missing


def table(found: Sequence[Comparison], missing: dict[str, str]) -> Table:
    view = Table(title="ratios within this run")
    for column in ("part", "what", "beside"):
        view.add_column(column, overflow="fold")
    for column in ("unit", "figure", "other", "times", "goal"):
        view.add_column(column, justify="right")
    for row in found:
        goal = "–" if row.goal is None else f"{row.goal:.2f} {'reached' if row.reached else 'missed'}"
        figures = (f"{row.ours:,.4g}", f"{row.other:,.4g}", f"{row.times:,.2f}")
        view.add_row(row.part, row.what, row.beside, row.unit, *figures, goal)
    for part, reason in missing.items():
        view.add_row(part, f"not measured: {reason}", "", "", "", "", "", "")
    return view


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.account", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--model", choices=list(MODELS), default="large-v3", help="whose shapes (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="together, in precision (%(default)s)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for each precision (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try out what does without")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    setting = Setting(MODELS[options.model], options.device, options.windows, options.timeout)
    console: Console = report.console()
    found, missing = measure(setting, options.parts, lambda text: console.print(text, highlight=False))
    console.print(table(found, missing))
    if options.json is not None:
        rows = [asdict(row) | {"times": row.times, "reached": row.reached} for row in found]
        payload = {
            "environment": report.environment(options.commit),
            "model": options.model,
            "comparisons": rows,
            "missing": missing,
        }
        report.write_json(options.json, payload)
    return 1 if missing or any(row.reached is False for row in found) else 0


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


if __name__ == "__main__":
    sys.exit(main())
