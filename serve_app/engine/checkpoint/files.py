"""Reading files that may be anything, without trusting a size they state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .form import CheckpointError, Shape

MAX_JSON_BYTES = 16 * 2**20
GIT_LFS_POINTER = b"version https://git-lfs.github.com/"


class ByteRange:
    """Regular files, one after the other, read as one range of bytes. Nothing is joined, in memory or on disk."""

    def __init__(self, paths: Sequence[Path]):
        self.where = paths[0]
        self._files = []
        self.size = 0
        with ExitStack() as stack:
            for path in paths:
                check_regular(path)
                file = stack.enter_context(path.open("rb", buffering=0))
                length = path.stat().st_size
                self._files.append((self.size, length, file))
                self.size += length
            self._close = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` (bytes) from ``offset``; the whole stretch must lie inside the range."""
        for start, length, file in self._files:
            while view and start <= offset < start + length:
                file.seek(offset - start)
                n = file.readinto(view[: start + length - offset])
                if not n:
                    raise CheckpointError(f"{self.where}: the file shrank while it was read")
                offset, view = offset + n, view[n:]
        if view:
            raise EOFError(f"{len(view)} bytes beyond the end of {self.where}")

    def read(self, offset: int, n: int) -> bytes:
        data = bytearray(n)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_tensor(self, offset: int, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """A little-endian array, copied once into a tensor of its own: its place in the file may be unaligned."""
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into(offset, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def sha256(self) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(2**20))
        for offset in range(0, self.size, len(buffer)):
            part = buffer[: self.size - offset]
            self.read_into(offset, part)
            digest.update(part)
        return digest.hexdigest()


def check_regular(path: Path) -> None:
    """A regular file with content; opening anything else, such as a pipe, could block."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    with path.open("rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights themselves: run `git lfs pull` there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    check_regular(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than the {MAX_JSON_BYTES} bytes that such a file may have")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
