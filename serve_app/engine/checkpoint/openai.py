"""OpenAI's ``.pt`` files, by path or by name through openai-whisper's own downloader.

Such a file is ``torch.save({"dims": {...}, "model_state_dict": {...}})``: a zip archive with one pickle and the
tensors' bytes. Python's unpickler never sees that pickle: its opcodes are checked against the few names it needs, then
PyTorch's weights-only reader maps the file.
"""

from __future__ import annotations

import base64
import fcntl
import gzip
import os
import pickletools
import re
import zipfile
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from .files import check_regular
from .form import Checkpoint, CheckpointError, check_shapes, check_values, listed, read_dims, tensor_shapes

ZIP_MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 16 * 2**20

_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Half|Float|BFloat16|Double|Char|Byte)Storage"
)
# Other ways by which a pickle could name code; ``torch.save`` uses none of them.
_FOREIGN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_WANTED = 'an OpenAI checkpoint holds {"dims": …, "model_state_dict": …}'


def load(path: Path, name: str, source: str) -> Checkpoint:
    """A ``.pt`` file; the tensors are memory-mapped. The file does not say which heads align."""
    check_regular(path)
    _check_archive(path)
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # PyTorch raises errors of many types for damaged files, some with advice that must not be followed here.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path}: damaged: PyTorch cannot read it: {reason:.300}") from error
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        held = f"a dict of {listed(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: not an OpenAI Whisper checkpoint: it holds {held}, while {_WANTED}")
    stated, state = content["dims"], content["model_state_dict"]
    if not isinstance(stated, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: dims or model_state_dict is not a dict, while {_WANTED}")
    dims = read_dims(stated, path)
    if strange := [key for key, value in state.items() if not isinstance(key, str) or not _is_plain(value)]:
        raise CheckpointError(f"{path}: no plain tensors: {listed(map(str, strange))}")
    shapes = tensor_shapes(dims)
    check_shapes({key: tuple(tensor.shape) for key, tensor in state.items()}, shapes, path)
    # A stride of 0 lets a small file claim tensors of any size; none may be unfolded.
    size = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if size > path.stat().st_size:
        raise CheckpointError(f"{path}: damaged: its tensors would take {size} bytes, more than the file has")
    tensors = {key: check_values(key, state[key].detach().contiguous(), path) for key in shapes}
    return Checkpoint(name, dims, tensors, None, source)


def load_named(name: str, source: str, root: Path | None = None) -> Checkpoint:
    """One of ``whisper.available_models()``, downloaded and verified (SHA-256) by openai-whisper.

    root: where downloads lie; by default openai-whisper's own folder, ``$XDG_CACHE_HOME/whisper``.
    """
    import whisper  # takes 1.5 s: it imports numba

    if root is None:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"
    url: str = whisper._MODELS[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The downloader writes in place: replicas that start together must not write the same file.
        with (root / f"{PurePosixPath(url).name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = Path(whisper._download(url, str(root), in_memory=False))
    except (OSError, RuntimeError, HTTPException) as error:
        raise CheckpointError(
            f"{name} could not be downloaded from {url} to {root}: {error}. Name a checkpoint's path instead, or "
            "embedded:base, which needs no network"
        ) from error
    checkpoint = load(path, name, source)
    dims = checkpoint.dims
    mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), dtype=bool)
    heads = np.argwhere(mask.reshape(dims.n_text_layer, dims.n_text_head))
    return replace(checkpoint, alignment_heads=[(int(layer), int(head)) for layer, head in heads])


def _check_archive(path: Path) -> None:
    """A zip archive as ``torch.save`` writes it, whose pickle needs no more than tensors and dicts."""
    with path.open("rb") as file:
        magic = file.read(len(ZIP_MAGIC))
    if magic != ZIP_MAGIC:
        raise CheckpointError(
            f"{path}: not an OpenAI Whisper checkpoint: it starts with {magic!r}, not as a zip archive (what torch "
            "wrote before 1.6 must be saved again)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = {PurePosixPath(record.filename).name: record for record in archive.infolist()}
            pickle = records.get("data.pkl")
            if pickle is None or "constants.pkl" in records:
                kind = "a TorchScript module" if "constants.pkl" in records else f"a zip archive of {listed(records)}"
                raise CheckpointError(f"{path}: not an OpenAI Whisper checkpoint: it is {kind}, while {_WANTED}")
            if pickle.file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(f"{path}: damaged: its pickle claims {pickle.file_size} bytes")
            opcodes = archive.read(pickle)
    except CheckpointError:
        raise
    except Exception as error:
        # zipfile raises errors of many types for damaged archives. The directory is at the end: what is cut has none.
        raise CheckpointError(f"{path}: truncated or damaged: a zip archive that cannot be read: {error}") from error
    _check_pickle(opcodes, path)


def _check_pickle(opcodes: bytes, path: Path) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(opcodes):
            if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
                what = str(argument).replace(" ", ".")
                raise CheckpointError(f"{path}: a pickle of something else: it names {what:.120}, while {_WANTED}")
            if opcode.name in _FOREIGN:
                raise CheckpointError(f"{path}: a pickle of something else: opcode {opcode.name}, while {_WANTED}")
    except CheckpointError:
        raise
    except (ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: its pickle cannot be read: {error}") from error


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
