"""What nvidia-smi says of a GPU over some seconds: a reading beside our own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

GPM_IDS = (2, 3, 5, 10)
"""For dmon: busy multiprocessors, warps on them, Tensor Cores, memory bandwidth."""

COLUMNS = {
    "smutil": ("sm_utilization", 0.01),
    "smocc": ("sm_occupancy", 0.01),
    "mmaact": ("tensor_activity", 0.01),
    "dram": ("dram_utilization", 0.01),
    "sm": ("kernel_time", 0.01),
    "pwr": ("power_w", 1.0),
    "gtemp": ("temperature_c", 1.0),
    "fb": ("memory_used", 2.0**20),
}
"""dmon's columns → our names, and what theirs are multiplied by."""

GRACE_S = 5.0


class NvidiaSmiFailed(Exception):
    """nvidia-smi is not there, or refuses; the message has its words."""


@dataclass(frozen=True, slots=True)
class Row:
    """at: Unix time, to the second. values: by our names; without those that it did not tell."""

    at: float
    values: dict[str, float]


class Monitor:
    """``nvidia-smi dmon`` of one GPU in the background, a row a second, for so many seconds.

    index: nvidia-smi's number of the GPU. gpm: read what the multiprocessors do, too.
    """

    def __init__(self, index: int, seconds: int, *, gpm: bool):
        self._end = time.monotonic() + seconds + GRACE_S
        command = ["nvidia-smi", "dmon", "-i", str(index), "-s", "pum", "-d", "1", "-c", str(seconds), "-o", "DT"]
        if gpm:
            command += ["--gpm-metrics", ",".join(map(str, GPM_IDS)), "--gpm-options", "d"]
        self.command = " ".join(command)
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise NvidiaSmiFailed(f"nvidia-smi cannot be run: {error}") from None

    def rows(self) -> list[Row]:
        """Waits until it has ended, and gives what it said. Raises NvidiaSmiFailed where it said nothing of use."""
        try:
            output, _ = self._process.communicate(timeout=max(0.1, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.terminate()
            output, _ = self._process.communicate(timeout=GRACE_S)
        rows = read_dmon(output.splitlines())
        if not rows:
            words = " | ".join(output.strip().splitlines()[-3:])
            raise NvidiaSmiFailed(f"`{self.command}` ended with status {self._process.returncode}: {words}")
        return rows

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=GRACE_S)


def read_dmon(lines: Iterable[str]) -> list[Row]:
    """dmon's table, whose header comes again and again (pure, but for the time zone). A value that is ``-`` is left
    out; so is a line that is not as long as the header."""
    names: list[str] = []
    rows = []
    for line in lines:
        if line.startswith("#"):
            words = line.lstrip("#").lower().split()
            if "gpu" in words:
                names = words
            continue
        words = line.split()
        if not names or len(words) != len(names):
            continue
        row = dict(zip(names, words, strict=True))
        values = {}
        for column, (name, unit) in COLUMNS.items():
            with suppress(KeyError, ValueError):
                values[name] = float(row[column]) * unit
        with suppress(KeyError, ValueError):
            at = time.mktime(time.strptime(f"{row['date']} {row['time']}", "%Y%m%d %H:%M:%S"))
            rows.append(Row(at, values))
    return rows


def query(index: int) -> dict[str, float]:
    """Memory and power as ``nvidia-smi -q`` has them, now. Raises NvidiaSmiFailed."""
    fields = {"memory.used": 2.0**20, "memory.total": 2.0**20, "power.draw": 1.0, "temperature.gpu": 1.0}
    names = ("memory_used", "memory_total", "power_w", "temperature_c")
    command = ["nvidia-smi", "-i", str(index), f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NvidiaSmiFailed(f"`{' '.join(command)}`: {error}") from None
    words = [word.strip() for word in done.stdout.strip().split(",")]
    values = {}
    for name, word, unit in zip(names, words, fields.values(), strict=False):
        with suppress(ValueError):  # [N/A]
            values[name] = float(word) * unit
    return values
