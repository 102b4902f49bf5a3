"""The plain attention kernels: what they read, by Nsight Compute, and the first beside plain Python and NumPy."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.encoder_attention import SIMPLE_VARIANTS, reference, simple_attention
from loadtest.gpu.account.comparison import Comparison, NotMeasured, Setting, host_milliseconds, need_gpu
from loadtest.gpu.timing import graph_milliseconds

Array = npt.NDArray[Any]

GOAL_SECTORS = 1 / (1 - 0.62)
GOAL_PYTHON = 27.0

NCU_SECONDS = 300
SECTORS = {
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "sectors that loads of global memory ask for",
    "lts__t_sectors_op_read.sum": "sectors read from the L2 cache",
}
LAUNCH = "from loadtest.gpu.account.attention import launch_plain; launch_plain()"
TINY, WINDOW = (1, 64, 6), (1, 1500, 6)
"""Batch, positions and heads: one that plain Python can do, and one window of the tiny model."""
QUERIES = 4  # of a window that plain Python computes: each of its 9,000 is the same work


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


def python(setting: Setting) -> list[Comparison]:
    """The kernel's time is the GPU's alone: what goes to it and comes back is not counted."""
    need_gpu(setting)
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
        numpy_ms = host_milliseconds(partial(numpy_attention, array), 20 if shape == TINY else 3)
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


def _projections(shape: tuple[int, int, int]) -> Tensor:
    batch, positions, heads = shape
    return torch.randn(batch, positions, 3, heads, 64, device="cuda").half()
