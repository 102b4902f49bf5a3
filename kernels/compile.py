"""CUDA C++ from ``kernels/cuda`` to machine code, by NVRTC through cuda-python, with a cache on disk.

A cubin is named by everything that decides what is in it: the source with the headers it includes, the definitions,
the options, the architecture and the compiler's version. So a cache never goes stale, many machines may share one, and
an image can bring it filled (``whisper-serve kernels build``). The compiler's log lies beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
"""What every kernel is compiled for in the tests, and by default into images."""

OPTIONS = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}
"""NOTES: no fast mathematics for all; where an approximation is good enough the source names its instruction."""

CACHE_VARIABLE = "WHISPER_SERVE_KERNEL_CACHE"


class CompileError(RuntimeError):
    """The compiler refused a source; the message holds its log, which names file and line."""


@dataclass(frozen=True)
class Build:
    """One source with one set of definitions. ``architectures``: those it is made for."""

    source: str
    definitions: tuple[tuple[str, int | str], ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES

    def __str__(self) -> str:
        return " ".join([self.source, *(f"{name}={value}" for name, value in self.definitions)])


def build(source: str, architectures: tuple[str, ...] = ARCHITECTURES, /, **definitions: int | str) -> Build:
    """A source of ``kernels/cuda`` and the macros it is compiled with."""
    return Build(source, tuple(sorted(definitions.items())), architectures)


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says that a kernel uses, by thread and by block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def text_with_headers(path: Path) -> str:
    """A source with the local headers it includes put in, each once, in the order in which they are met."""
    seen: set[Path] = set()

    def expand(path: Path) -> Iterator[str]:
        if path in seen:
            return
        seen.add(path)
        yield f'#line 1 "{path.name}"'
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            include = re.match(r'\s*#include "(.+)"', line)
            if include is None:
                yield "" if line.startswith("#pragma once") else line
                continue
            header = path.parent / include[1]
            if not header.is_file():
                raise CompileError(f"{path.name}:{number} includes {include[1]}, which is not beside it")
            yield from expand(header)
            yield f'#line {number + 1} "{path.name}"'

    return "\n".join(expand(path)) + "\n"


def compiler_version() -> str:
    """NVRTC's, for example ``13.0``."""
    from cuda.bindings import nvrtc

    try:
        error, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as missing:  # cuda-python looks for the library when it is first called
        raise CompileError(f"NVRTC is not installed (pip install nvidia-cuda-nvrtc): {missing}") from missing
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not tell its version: {error}")
    return f"{major}.{minor}"


def cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper-serve" / "kernels"


def compile_cubin(build: Build, architecture: str, folder: Path | None = None) -> bytes:
    """A build's machine code, from the cache (``cache_folder`` if no other is given) or from the compiler; CompileError
    where it does not compile."""
    return _compiled(build, architecture, folder, ".cubin")


def is_compiled(build: Build, architecture: str, folder: Path | None = None) -> bool:
    """Whether the cache has its machine code."""
    text = text_with_headers(SOURCES / build.source)
    return _path(text, build, architecture, folder).with_suffix(".cubin").is_file()


def resources(build: Build, architecture: str, folder: Path | None = None) -> dict[str, Resources]:
    """What the kernels of a build use, by their names; it comes from the cache as ``compile_cubin`` does."""
    log = _compiled(build, architecture, folder, ".log").decode()
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = {}
    for match in pattern.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["name"]] = Resources(
            int(match["registers"]), int(match["stores"]) + int(match["loads"]), int(shared[1]) if shared else 0
        )
    return found


def _compiled(build: Build, architecture: str, folder: Path | None, suffix: str) -> bytes:
    text = text_with_headers(SOURCES / build.source)
    path = _path(text, build, architecture, folder)
    with contextlib.suppress(OSError):
        return path.with_suffix(suffix).read_bytes()
    with _only_one(path):
        with contextlib.suppress(OSError):  # another process has made it while this one waited
            return path.with_suffix(suffix).read_bytes()
        made = _compile(text, build, architecture)
        for kind, content in made.items():
            _store(path.with_suffix(kind), content)
    return made[suffix]


def _path(text: str, build: Build, architecture: str, folder: Path | None) -> Path:
    """Without a suffix."""
    parts = [text, repr(build.definitions), repr(OPTIONS), architecture, compiler_version()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return (folder or cache_folder()) / f"{Path(build.source).stem}-{architecture}-{key}"


def _compile(text: str, build: Build, architecture: str) -> dict[str, bytes]:
    """The log and the machine code, by their suffixes, in the order in which they are to be stored."""
    from cuda.core import Program, ProgramOptions

    compiler_version()  # says clearly where the compiler is missing
    log = io.StringIO()
    options = ProgramOptions(
        name=build.source,
        arch=architecture,
        **OPTIONS,
        define_macro=[(name, str(value)) for name, value in build.definitions] or None,  # refuses an empty list
    )
    try:
        code = Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:  # cuda-python's own exception types differ between versions
        raise CompileError(f"{build} does not compile for {architecture}:\n{error}") from error
    return {".log": log.getvalue().encode(), ".cubin": bytes(code.code)}


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Keeps replicas that start together from compiling the same thing. A folder that cannot be written to is no
    reason to stop: each then compiles for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f".{path.name}.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process dies
        yield


def _store(path: Path, content: bytes) -> None:
    """Writes beside, then renames: who reads sees all of it or nothing."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # an image is filled by one user and read by another
            os.fsync(file.fileno())
            Path(file.name).rename(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
