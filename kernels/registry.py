"""Every build of every kernel: what an image brings compiled, and what the tests compile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kernels import (
    embedding,
    encoder_attention,
    gelu,
    latent_attention,
    layer_norm,
    linear,
    log_mel,
    next_token,
    persistent_step,
    self_attention,
)
from kernels.compile import Build, CompileError, Resources, is_compiled, resources

MODULES = (
    embedding,
    encoder_attention,
    gelu,
    latent_attention,
    layer_norm,
    linear,
    log_mel,
    next_token,
    persistent_step,
    self_attention,
)
BUILDS: tuple[Build, ...] = tuple(made for module in MODULES for made in module.BUILDS)

Target = tuple[Build, str]
"""A build, and an architecture that it is made for."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A build for one architecture: what its kernels use, by their names, or why there is none."""

    build: Build
    architecture: str
    kernels: dict[str, Resources] = field(default_factory=dict)
    error: str | None = None


def targets(architectures: Iterable[str]) -> list[Target]:
    """All that is compiled for these."""
    return [
        (made, architecture) for architecture in architectures for made in BUILDS if architecture in made.architectures
    ]


def compile_targets(these: Sequence[Target], folder: Path | None = None) -> Iterator[Compiled]:
    """Compiles what the cache (``cache_folder`` if no other is given) does not have yet, on all cores; gives the
    results in order."""

    def one(target: Target) -> Compiled:
        try:
            used = resources(*target, folder)
        except CompileError as error:
            return Compiled(*target, error=str(error))
        if not is_compiled(*target, folder):
            return Compiled(*target, used, "compiled, but could not be stored")
        return Compiled(*target, used)

    importlib.import_module("cuda.core")  # NOTES: threads that import it at once find it half made
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # the compiler lets go of Python's lock
        yield from pool.map(one, these)
