"""From CUDA C++ to machine code, without a GPU."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from kernels import compile as compiling
from kernels.compile import ARCHITECTURES, CACHE_VARIABLE, CompileError, build, compile_cubin, is_compiled, resources

SOURCE = """#include "sum.cuh"
extern "C" __global__ void add(float* x) { x[threadIdx.x] = sum(x[threadIdx.x], AMOUNT); }
"""
HEADER = """#pragma once

__device__ float sum(float a, float b) { return a + b; }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small kernel, and an empty cache."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "add.cu").write_text(SOURCE)
    (folder / "sum.cuh").write_text(HEADER)
    monkeypatch.setattr(compiling, "SOURCES", folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


def cached(sources: Path) -> set[str]:
    return {path.name for path in (sources.parent / "cache").glob("*.cubin")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_compiles_without_a_gpu(sources: Path, architecture: str) -> None:
    assert compile_cubin(build("add.cu", AMOUNT=1), architecture).startswith(b"\x7fELF")
    used = resources(build("add.cu", AMOUNT=1), architecture)
    assert set(used) == {"add"}
    assert used["add"].registers > 0
    assert used["add"].spill_bytes == used["add"].shared_bytes == 0


def test_the_second_time_it_comes_from_the_cache(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("add.cu", AMOUNT=1)
    assert not is_compiled(made, "sm_80")
    first, used = compile_cubin(made, "sm_80"), resources(made, "sm_80")
    assert is_compiled(made, "sm_80")

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling, "_compile", refuse)
    assert compile_cubin(made, "sm_80") == first
    assert resources(made, "sm_80") == used


def test_what_one_user_compiles_into_an_image_another_can_read_without_writing(sources: Path) -> None:
    compile_cubin(build("add.cu", AMOUNT=1), "sm_80")
    kept = [path for path in (sources.parent / "cache").iterdir() if path.suffix in (".cubin", ".log")]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o644}
    for lock in (sources.parent / "cache").glob(".*.lock"):
        lock.unlink()
    before = set((sources.parent / "cache").iterdir())
    compile_cubin(build("add.cu", AMOUNT=1), "sm_80")
    assert set((sources.parent / "cache").iterdir()) == before == set(kept)


def test_whatever_decides_the_code_names_it_in_the_cache(sources: Path) -> None:
    compile_cubin(build("add.cu", AMOUNT=1), "sm_80")
    compile_cubin(build("add.cu", AMOUNT=2), "sm_80")
    compile_cubin(build("add.cu", AMOUNT=1), "sm_89")
    (sources / "sum.cuh").write_text(HEADER.replace("a + b", "a - b"))
    compile_cubin(build("add.cu", AMOUNT=1), "sm_80")
    assert len(cached(sources)) == 4


def test_an_error_names_file_and_line(sources: Path) -> None:
    (sources / "sum.cuh").write_text(HEADER.replace("a + b", "a + c"))
    with pytest.raises(CompileError, match=r'sum\.cuh\(3\): error: identifier "c" is undefined'):
        compile_cubin(build("add.cu", AMOUNT=1), "sm_80")
    (sources / "sum.cuh").write_text(HEADER)
    (sources / "add.cu").write_text(SOURCE.replace("AMOUNT", "WHAT"))
    with pytest.raises(CompileError, match=r"add\.cu\(2\): error"):
        compile_cubin(build("add.cu", AMOUNT=1), "sm_80")


def test_a_missing_header_is_named(sources: Path) -> None:
    (sources / "sum.cuh").unlink()
    with pytest.raises(CompileError, match=r"add\.cu:1 includes sum\.cuh"):
        compile_cubin(build("add.cu", AMOUNT=1), "sm_80")


def test_an_unknown_architecture_is_an_error(sources: Path) -> None:
    with pytest.raises(CompileError, match="sm_12345"):
        compile_cubin(build("add.cu", AMOUNT=1), "sm_12345")


def test_a_cache_that_cannot_be_written_to_is_no_obstacle(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/proc/no/such/folder")
    assert compile_cubin(build("add.cu", AMOUNT=1), "sm_80").startswith(b"\x7fELF")


def _compile_counted(folder: Path, compiled: Path) -> None:
    compiling.SOURCES = folder
    original = compiling._compile

    def counted(*arguments: object) -> object:
        (compiled / str(os.getpid())).touch()
        return original(*arguments)  # type: ignore[arg-type]

    compiling._compile = counted  # type: ignore[assignment]
    assert compile_cubin(build("add.cu", AMOUNT=3), "sm_80").startswith(b"\x7fELF")


def test_of_many_that_start_together_one_compiles(sources: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_compile_counted, args=(sources, compiled)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len(list(compiled.iterdir())) == 1
    assert len(cached(sources)) == 1
