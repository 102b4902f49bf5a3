"""CUDA C++ from ``kernels/cuda`` to machine code, by NVRTC through cuda-python, with a cache on disk.

A cubin is named by everything that decides what is in it: the source with the headers it includes, the definitions,
the options, the architecture and the compiler's version. So a cache never goes stale, many machines may share one, and
an image can bring it filled (``whisper-serve kernels build``).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cuda"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
"""What every kernel is compiled for in the tests, and by default into images."""

OPTIONS = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}
"""NOTES: no fast mathematics for all; where an approximation is good enough the source names its instruction."""

CACHE_VARIABLE = "WHISPER_SERVE_KERNEL_CACHE"

Definitions = Mapping[str, int | str]


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


def compile_cubin(build: Build, architecture: str) -> bytes:
    """A build's machine code, from the cache or from the compiler; CompileError where it does not compile."""
    text = text_with_headers(SOURCES / build.source)
    key = _key(text, build, architecture)
    path = cache_folder() / f"{Path(build.source).stem}-{architecture}-{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    with _only_one(path):
        with contextlib.suppress(OSError):  # another process has made it while this one waited
            return path.read_bytes()
        cubin, _ = _compile(text, build, architecture)
        _store(path, cubin)
    return cubin


def resources(build: Build, architecture: str) -> dict[str, Resources]:
    """Compiles anew, and reports what each kernel of the build uses."""
    _, log = _compile(text_with_headers(SOURCES / build.source), build, architecture)
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


def _key(text: str, build: Build, architecture: str) -> str:
    parts = [text, repr(build.definitions), repr(OPTIONS), architecture, compiler_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(text: str, build: Build, architecture: str) -> tuple[bytes, str]:
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
    return bytes(code.code), log.getvalue()


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Keeps replicas that start together from compiling the same thing. A folder that cannot be written to is no
    reason to stop: each then compiles for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f".{path.stem}.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process dies
        yield


def _store(path: Path, cubin: bytes) -> None:
    """Writes beside, then renames: who reads sees all of it or nothing."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(cubin)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).rename(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def architecture_of(device: torch.device) -> str:
    """The architecture to compile for: Hopper's own instructions need its name with an ``a``."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise CompileError(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; the kernels need sm_80 or newer"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@cache
def _load(build: Build, index: int) -> Any:
    """A build's machine code on GPU ``index``."""
    from cuda.core import Device, ObjectCode

    Device(index).set_current()  # PyTorch's own context
    cubin = compile_cubin(build, architecture_of(torch.device("cuda", index)))
    return ObjectCode.from_cubin(cubin, name=build.source)


class Kernel:
    """One kernel of a build, ready to launch.

    Calling it launches on PyTorch's current stream, so that it can be captured in a CUDA Graph. Arguments: tensors
    pass their address, ``None`` a null pointer, everything else must be a ctypes value, whose type has to be the
    parameter's: nothing checks that.
    """

    def __init__(self, build: Build, name: str, device: torch.device, *, shared_bytes: int = 0):
        """shared_bytes: dynamic shared memory of each block."""
        from cuda.bindings import driver
        from cuda.core import Device

        index = torch.cuda.current_device() if device.index is None else device.index
        self._kernel = _load(build, index).get_kernel(name)
        self._shared_bytes = shared_bytes
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            handle = driver.CUkernel(int(self._kernel.handle))
            (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, Device(index).device_id)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{build}: {shared_bytes} bytes of shared memory a block are refused: {error.name}")

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Any,
        cluster: int | tuple[int, ...] | None = None,
    ) -> None:
        """grid: in blocks, or in clusters where ``cluster`` gives the blocks of one."""
        from cuda.core import launch

        stream = torch.cuda.current_stream().cuda_stream
        launch(
            _stream(stream), _config(grid, block, cluster, self._shared_bytes), self._kernel, *map(_value, arguments)
        )


@cache
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@cache
def _config(grid: Any, block: Any, cluster: Any, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, cluster=cluster, shmem_size=shared_bytes)


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    if type(argument).__name__ == "TensorMapDescriptor":  # from tensor_map; a __grid_constant__ TensorMap parameter
        return argument
    raise TypeError(f"a kernel takes tensors, None and ctypes values, not {type(argument).__name__}")


def builds(sequence: Sequence[Build], architecture: str) -> list[Build]:
    """Those that are made for this architecture."""
    return [b for b in sequence if architecture in b.architectures]


class _Memory:
    """An address with a shape, for cuda-python: it does not keep the memory, as a tensor would."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str):
        self.__cuda_array_interface__ = {"version": 3, "typestr": kind, "shape": shape, "data": (address, False)}


@lru_cache(maxsize=4096)
def _tensor_map(address: int, shape: tuple[int, ...], box: tuple[int, ...], index: int, kind: str) -> Any:
    from cuda.core import Device
    from cuda.core.utils import StridedMemoryView

    Device(index).set_current()
    view = StridedMemoryView.from_cuda_array_interface(_Memory(address, shape, kind), stream_ptr=-1)
    swizzle, promotion = _tensor_map_enums()
    return view.as_tensor_map(box_dim=box, swizzle=swizzle, l2_promotion=promotion)


def _tensor_map_enums() -> tuple[Any, Any]:
    from cuda.core import _tensor_map as enums  # NOTES: 1.2 takes these enumerations and exports them nowhere else

    return enums.TensorMapSwizzle.SWIZZLE_128B, enums.TensorMapL2Promotion.L2_128B


def tensor_map(tensor: Tensor, box: tuple[int, ...], shape: tuple[int, ...] | None = None) -> Any:
    """What Hopper's copy engine needs to know of a contiguous FP16 or FP32 tensor; an argument for a ``Kernel``.

    box: what one copy moves, outermost first as in ``shape`` (by default the tensor's own; at most 5 dimensions); its
    innermost extent is one 128-byte row (64 or 32 elements), stored with the 128-byte swizzle. What lies outside of the
    tensor is read as zeros and not written. Maps are kept by address and shape, which decide all that is in them, so a
    replay of a CUDA Graph, which finds its tensors where they were, finds its maps right too.
    """
    index = torch.cuda.current_device() if tensor.device.index is None else tensor.device.index
    kind = {torch.float16: "<f2", torch.float32: "<f4"}[tensor.dtype]
    return _tensor_map(tensor.data_ptr(), tuple(tensor.shape if shape is None else shape), box, index, kind)
