"""``whisper-serve kernels build``: all kernels compiled ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kernels.compile import Resources, cache_folder, compiler_version
from kernels.registry import compile_targets, targets


def compile_kernels(architectures: Sequence[str], folder: Path | None) -> int:
    """Compiles into ``folder``, by default the kernels' cache, and prints a line for each build; what is there already
    is only told. Returns how many could not be compiled or stored; why goes to stderr. CompileError where there is no
    compiler, OSError where the folder cannot be written to."""
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    folder = folder or cache_folder()
    console.print(f"NVRTC {compiler_version()}, into {folder}", markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    wanted = targets(architectures)
    failed = 0
    for count, made in enumerate(compile_targets(wanted, folder), start=1):
        head = f"[{count:{len(str(len(wanted)))}}/{len(wanted)}] {made.architecture:6} {made.build}"
        used = "; ".join(f"{name} {_text(used)}" for name, used in made.kernels.items())
        console.print(f"{head}: {used or 'failed'}", markup=False)
        if made.error is not None:
            failed += 1
            errors.print(f"{made.architecture} {made.build}: {made.error}", style="red", markup=False)
    console.print(f"{len(wanted) - failed} of {len(wanted)} builds for {', '.join(architectures)}", markup=False)
    return failed


def _text(used: Resources) -> str:
    return f"{used.registers} registers, {used.spill_bytes} bytes spilled, {used.shared_bytes} bytes shared"
