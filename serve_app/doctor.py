"""``whisper-serve doctor``: what this machine has, and what will run where."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from kernels.compile import CompileError, cache_folder, compiler_version, is_compiled
from kernels.launch import architecture_of
from kernels.registry import targets
from serve_app.audio.decode import AudioDecoder
from serve_app.audio.zygote import SandboxReport
from serve_app.engine.checkpoint import CheckpointError, load
from serve_app.engine.precision import Compute, has_bfloat16_products
from serve_app.settings import Settings, known
from serve_app.stages.threads import default_threads


def examine(settings: Settings, console: Console) -> bool:
    """Prints what was found; returns whether the application can start here."""
    machine = Table("machine", "", show_lines=False, title_justify="left")
    for name, value in _machine(settings):
        machine.add_row(name, value)
    console.print(machine)

    problems: list[str] = []
    plan = Table("stage", "replicas", "device", "products in", "threads", "GPU share each")
    try:
        compute = Compute.resolve(settings.model.device, settings.model.compute)
        settings = settings.filled(on_gpu=compute.device.type == "cuda")
    except (RuntimeError, ValueError) as error:
        problems.append(str(error))
    else:
        precision = str(compute.dtype).removeprefix("torch.")
        stages = {"features": settings.features, "encoder": settings.encoder, "decoder": settings.decoder}
        for name, stage in stages.items():
            products = "float32" if name == "features" else precision
            threads = str(stage.threads or default_threads())
            plan.add_row(
                name, str(stage.replicas), compute.device.type, products, threads, f"{known(stage.num_gpus):g}"
            )
        if compute.has_kernels:
            problems += _kernel_problems()
        plan.add_row("api", str(settings.http.replicas), "cpu", "", "1", "")
        console.print(plan)
        wanted = sum(known(stage.num_gpus) * stage.replicas for stage in stages.values())
        if wanted > torch.cuda.device_count():
            problems.append(f"the replicas want {wanted:g} GPUs together; this machine has {torch.cuda.device_count()}")

    try:
        checkpoint = load(settings.model.source)
    except CheckpointError as error:
        problems.append(str(error))
    else:
        d = checkpoint.dims
        kind = f"{d.num_languages} languages" if d.multilingual else "English only"
        console.print(
            f"model: {checkpoint.name} ({settings.model.source}): {d.n_audio_layer} + {d.n_text_layer} layers, "
            f"width {d.n_audio_state}, {d.n_mels} mel bands, {kind}",
            highlight=False,
        )
    problems += _port(settings)
    for problem in problems:
        console.print(f"[red]problem[/]: {problem}", highlight=False)
    if not problems:
        console.print("[green]ready[/]: `whisper-serve serve` can start here")
    return not problems


def _machine(settings: Settings) -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    instructions = "with" if has_bfloat16_products() else "without"
    found = [
        ("python", platform.python_version()),
        ("packages", ", ".join(f"{p} {version(p)}" for p in ("whisper-serve", "ray", "torch", "av"))),
        ("CPU", f"{cores} cores, {memory:.0f} GiB of memory, {instructions} bfloat16 matrix instructions"),
        ("audio sandbox", _sandbox(settings)),
        ("kernel compiler", _kernel_compiler()),
        ("kernel cache", str(cache_folder())),
    ]
    if not torch.cuda.is_available():
        found.append(("GPU", "none that PyTorch can use"))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = gpu.total_memory / 2**30
        found.append((f"GPU {index}", f"{gpu.name}, {size:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"))
        found.append((f"kernels of GPU {index}", _kernels(index)))
    return found


def _kernel_compiler() -> str:
    try:
        return f"NVRTC {compiler_version()}"
    except CompileError as missing:
        return str(missing)


def _kernels(index: int) -> str:
    """How many of a GPU's kernels need not be compiled when they are first used."""
    try:
        architecture = architecture_of(torch.device("cuda", index))
        wanted = targets([architecture])
        ready = sum(is_compiled(*target) for target in wanted)
    except CompileError as error:
        return str(error)
    if not wanted:
        return f"none are made for {architecture} ahead of time; each is compiled when it is first used"
    return f"{ready} of {len(wanted)} for {architecture} lie in the cache; the others are compiled when first used"


def _kernel_problems() -> list[str]:
    """What keeps the kernels from running on the GPUs here."""
    try:
        compiler_version()
        for index in range(torch.cuda.device_count()):
            architecture_of(torch.device("cuda", index))
    except CompileError as problem:
        return [str(problem)]
    return []


def _port(settings: Settings) -> list[str]:
    http = settings.http
    try:
        with socket.create_server((http.host, http.port)):
            return []
    except OSError as error:
        return [f"cannot listen on {http.host}:{http.port}: {error.strerror}"]


def _sandbox(settings: Settings) -> str:
    """What holds the processes that decode strangers' audio, from a trial."""

    async def report() -> SandboxReport | None:
        async with AudioDecoder(settings.audio) as decoder:
            return decoder.report

    found = asyncio.run(report())
    assert found is not None
    held = "system calls filtered" if found.seccomp is None else f"no system-call filter ({found.seccomp})"
    return f"{held}, resource limits" + (f"; it could open {', '.join(found.leaks)}" if found.leaks else "")
