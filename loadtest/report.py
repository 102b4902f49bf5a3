"""What a measurement must say beside its figures, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pynvml
from rich.console import Console

FILE_COLUMNS = 140
PACKAGES = (
    "whisper-serve",
    "ray",
    "torch",
    "openai-whisper",
    "faster-whisper",
    "ctranslate2",
    "transformers",
    "av",
    "silero-vad",
)


def environment(commit: str | None = None) -> dict[str, Any]:
    """Command, date, commit, hardware and versions of this run, on this machine. commit: where this code lies outside
    of its repository."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def console() -> Console:
    """For tables: in files and pipes, which have no width of their own, wide enough that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def write_json(path: Path, payload: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """Commit of the working tree that this module lies in, marked where it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    return {"cpu": _cpu(), "cores": cores, "memory_gib": _memory_gib(), **_gpus()}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpus() -> dict[str, Any]:
    """Names of the GPUs, and the driver's version where there are any."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpus": []}
    names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    return {"gpus": names, "driver": pynvml.nvmlSystemGetDriverVersion()}


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
