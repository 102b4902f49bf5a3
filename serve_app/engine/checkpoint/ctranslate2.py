"""CTranslate2 folders: ``model.bin`` (binary version 6, WhisperSpec revision 3) and ``config.json``.

All integers are little-endian; a string is a u16 length, the bytes and a NUL that the length includes::

    u32 binary version | string spec | u32 revision
    u32 n | n variables: string name | u8 rank | u32 dim[rank] | u8 dtype | u32 nbytes | bytes
    u32 n | n aliases: string alias | string name of a variable

The layout is that of ``ModelSpec._serialize`` in CTranslate2's Python package. Nothing is aligned. A converter makes an
alias of any array that equals an earlier one; the tied output projection always is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import ByteRange, read_json
from .form import (
    Checkpoint,
    CheckpointError,
    Dims,
    Shape,
    check_shapes,
    check_values,
    listed,
    read_alignment_heads,
    read_dims,
    tensor_shapes,
)

BINARY_VERSION = 6
SPEC = "WhisperSpec"
REVISION = 3
# large-v3 has about 1,300; a forged count must not cost time.
MAX_VARIABLES = 100_000

_INTEGERS = {1: 1, 2: 2, 3: 4}
_FLOATS = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}
_ITEM_SIZES = _INTEGERS | {code: dtype.itemsize for code, dtype in _FLOATS.items()}
_TYPE_NAMES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16", 5: "bfloat16"}

_OUTPUT = "decoder/projection/weight"
_EMBEDDING = "decoder/embeddings/weight"
# What makes the decoder Whisper's: exact GELU, normalisation before each sublayer, embeddings as stored.
_ARCHITECTURE = {
    "decoder/activation": 3,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}

_OUTSIDE = {
    "encoder.positional_embedding": "encoder/position_encodings/encodings",
    "encoder.conv1": "encoder/conv1",
    "encoder.conv2": "encoder/conv2",
    "encoder.ln_post": "encoder/layer_norm",
    "decoder.positional_embedding": "decoder/position_encodings/encodings",
    "decoder.token_embedding": "decoder/embeddings",
    "decoder.ln": "decoder/layer_norm",
}
# In a layer: the variable, which part of its rows, and of how many equal parts.
_INSIDE = {
    "attn_ln": ("self_attention/layer_norm", 0, 1),
    "attn.query": ("self_attention/linear_0", 0, 3),
    "attn.key": ("self_attention/linear_0", 1, 3),
    "attn.value": ("self_attention/linear_0", 2, 3),
    "attn.out": ("self_attention/linear_1", 0, 1),
    "cross_attn_ln": ("attention/layer_norm", 0, 1),
    "cross_attn.query": ("attention/linear_0", 0, 1),
    "cross_attn.key": ("attention/linear_1", 0, 2),
    "cross_attn.value": ("attention/linear_1", 1, 2),
    "cross_attn.out": ("attention/linear_2", 0, 1),
    "mlp_ln": ("ffn/layer_norm", 0, 1),
    "mlp.0": ("ffn/linear_0", 0, 1),
    "mlp.2": ("ffn/linear_1", 0, 1),
}


@dataclass(frozen=True, slots=True)
class Variable:
    shape: Shape
    dtype: int
    offset: int
    nbytes: int


def load(folder: Path, name: str, source: str) -> Checkpoint:
    """A folder that ``ct2-transformers-converter`` wrote, in float32, float16 or bfloat16."""
    return load_parts([folder / "model.bin"], folder / "config.json", name, source)


def load_parts(parts: list[Path], config: Path, name: str, source: str, sha256: str | None = None) -> Checkpoint:
    """``model.bin`` in parts, and its ``config.json`` where there is one. ``sha256``: of the parts joined, if known."""
    where = parts[0]
    with ByteRange(parts) as file:
        if sha256 is not None and (found := file.sha256()) != sha256:
            raise CheckpointError(f"{where}: not the expected weights: SHA-256 is {found}, expected {sha256}")
        variables = read_variables(file)
        scalars = {key: variables.pop(key) for key in [k for k, v in variables.items() if not v.shape]}
        _check_types(variables, where)
        dims = _dims(file, scalars, variables, where)
        _check_names(dims, variables, file.size, where)
        tensors = _read_tensors(file, dims, variables, where)
    options = read_json(config) if config.exists() else {}
    heads = read_alignment_heads(options.get("alignment_heads"), dims, config)
    return Checkpoint(name, dims, tensors, heads, source)


class _Cursor:
    """Reads on from one place, and says what a file ends in the middle of."""

    def __init__(self, file: ByteRange):
        self.file = file
        self.at = 0

    def require(self, n: int, what: str) -> None:
        left = self.file.size - self.at
        if n > left:
            raise CheckpointError(f"{self.file.where}: truncated in {what}: {n} bytes expected, {left} present")

    def read(self, n: int, what: str) -> bytes:
        self.require(n, what)
        data = self.file.read(self.at, n)
        self.at += n
        return data

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.read(size, what), "little")

    def string(self, what: str) -> str:
        data = self.read(self.integer(2, what), what)
        if not (data.endswith(b"\0") and data.isascii() and data.count(b"\0") == 1):
            raise CheckpointError(f"{self.file.where}: damaged in {what}: {data[:40]!r} is not a name")
        return data[:-1].decode("ascii")


def read_variables(file: ByteRange) -> dict[str, Variable]:
    """Every variable and alias by name, without reading their data; the whole file must be accounted for."""
    cursor, where = _Cursor(file), file.where
    _read_header(cursor)
    count = cursor.integer(4, "the count of variables")
    if count > MAX_VARIABLES:
        raise CheckpointError(f"{where}: damaged: it claims {count} variables, no Whisper has that many")
    variables: dict[str, Variable] = {}
    for i in range(count):
        name = cursor.string(f"the name of variable {i + 1} of {count}")
        if name in variables:
            raise CheckpointError(f"{where}: variable {name} occurs twice")
        variables[name] = _read_variable(cursor, name)
    aliases = cursor.integer(4, "the count of aliases")
    if aliases > MAX_VARIABLES:
        raise CheckpointError(f"{where}: damaged: it claims {aliases} aliases, no Whisper has that many")
    for i in range(aliases):
        alias = cursor.string(f"alias {i + 1} of {aliases}")
        target = cursor.string(f"the target of alias {alias}")
        if alias in variables or target not in variables:
            raise CheckpointError(f"{where}: {alias} cannot be an alias of {target}")
        variables[alias] = variables[target]
    if trailing := file.size - cursor.at:
        raise CheckpointError(f"{where}: {trailing} bytes trail after the end of the model")
    return variables


def _read_header(cursor: _Cursor) -> None:
    where = cursor.file.where
    version = cursor.integer(4, "the header")
    if not 0 < version < 100:
        raise CheckpointError(f"{where}: not a CTranslate2 model: it starts with {version.to_bytes(4, 'little')!r}")
    if version != BINARY_VERSION:
        raise CheckpointError(
            f"{where}: CTranslate2 binary version {version}; version {BINARY_VERSION} can be read: convert "
            "the original again with a current ct2-transformers-converter"
        )
    spec = cursor.string("the header")
    if spec != SPEC:
        raise CheckpointError(f"{where}: a CTranslate2 model of another kind: {spec}, not {SPEC}")
    revision = cursor.integer(4, "the header")
    if revision != REVISION:
        raise CheckpointError(
            f"{where}: {SPEC} revision {revision}; revision {REVISION} can be read: convert the original again with a "
            "current ct2-transformers-converter"
        )


def _read_variable(cursor: _Cursor, name: str) -> Variable:
    what, where = f"the header of variable {name}", cursor.file.where
    rank = cursor.integer(1, what)
    shape = tuple(cursor.integer(4, what) for _ in range(rank))
    dtype = cursor.integer(1, what)
    nbytes = cursor.integer(4, what)
    if dtype not in _ITEM_SIZES:
        raise CheckpointError(f"{where}: variable {name} has the unknown data type {dtype}")
    if nbytes != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise CheckpointError(
            f"{where}: damaged: variable {name} claims {nbytes} bytes, which are not those of its shape "
            f"({listed(map(str, shape))}) in {_TYPE_NAMES[dtype]}"
        )
    cursor.require(nbytes, f"variable {name}")
    variable = Variable(shape, dtype, cursor.at, nbytes)
    cursor.at += nbytes
    return variable


def _check_types(arrays: Mapping[str, Variable], where: Path) -> None:
    types = {variable.dtype for variable in arrays.values()}
    if integers := types & _INTEGERS.keys():
        names = [name for name, variable in arrays.items() if variable.dtype in integers]
        raise CheckpointError(
            f"{where}: quantised to {_TYPE_NAMES[min(integers)]} ({listed(names, 1)}), which cannot be read: use the "
            "model converted with --quantization float16, or the original checkpoint"
        )
    if len(types) > 1:
        raise CheckpointError(f"{where}: damaged: arrays of several types: {listed(_TYPE_NAMES[t] for t in types)}")


def _dims(file: ByteRange, scalars: Mapping[str, Variable], arrays: Mapping[str, Variable], where: Path) -> Dims:
    def scalar(name: str) -> int:
        if name not in scalars:
            raise CheckpointError(f"{where}: scalar missing: {name}")
        variable = scalars[name]
        if variable.dtype not in _INTEGERS:
            raise CheckpointError(f"{where}: scalar {name} is {_TYPE_NAMES[variable.dtype]}, not an integer")
        return int.from_bytes(file.read(variable.offset, variable.nbytes), "little", signed=True)

    def size(name: str, axis: int, rank: int) -> int:
        if name not in arrays:
            raise CheckpointError(f"{where}: tensors missing: {name}")
        shape = arrays[name].shape
        if len(shape) != rank:
            raise CheckpointError(f"{where}: {name} has shape {shape}, not {rank} dimensions")
        return shape[axis]

    for name, value in _ARCHITECTURE.items():
        if (found := scalar(name)) != value:
            raise CheckpointError(f"{where}: not Whisper's architecture: {name} is {found}, Whisper's is {value}")
    if "decoder/alibi" in scalars and scalar("decoder/alibi"):
        raise CheckpointError(f"{where}: not Whisper's architecture: decoder/alibi is set")
    return read_dims(
        {
            "n_mels": size("encoder/conv1/weight", 1, 3),
            "n_audio_ctx": size("encoder/position_encodings/encodings", 0, 2),
            "n_audio_state": size("encoder/conv1/weight", 0, 3),
            "n_audio_head": scalar("encoder/num_heads"),
            "n_audio_layer": _layers("encoder", arrays, where),
            "n_vocab": size(_EMBEDDING, 0, 2),
            "n_text_ctx": size("decoder/position_encodings/encodings", 0, 2),
            "n_text_state": size(_EMBEDDING, 1, 2),
            "n_text_head": scalar("decoder/num_heads"),
            "n_text_layer": _layers("decoder", arrays, where),
        },
        where,
    )


def _layers(side: str, arrays: Mapping[str, Variable], where: Path) -> int:
    matches = (re.match(rf"{side}/layer_(\d{{1,9}})/", name) for name in arrays)
    layers = sorted({int(match[1]) for match in matches if match})
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{where}: the {side}'s layers are not contiguous: {listed(map(str, layers), 40)}")
    return len(layers)


def _locate(name: str) -> tuple[str, int, int]:
    """Where openai-whisper's tensor lies: variable, which part of its rows, of how many parts."""
    if name.endswith("positional_embedding"):
        return _OUTSIDE[name], 0, 1
    module, kind = name.rsplit(".", 1)
    part, parts = 0, 1
    if ".blocks." in module:
        side, _, layer, inside = module.split(".", 3)
        variable, part, parts = _INSIDE[inside]
        variable = f"{side}/layer_{layer}/{variable}"
    else:
        variable = _OUTSIDE[module]
    if variable.endswith("layer_norm"):
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    return f"{variable}/{kind}", part, parts


def _check_names(dims: Dims, arrays: Mapping[str, Variable], size: int, where: Path) -> None:
    expected: dict[str, Shape] = {_OUTPUT: (dims.n_vocab, dims.n_text_state)}
    for name, (rows, *columns) in tensor_shapes(dims).items():
        variable, _, parts = _locate(name)
        expected[variable] = (rows * parts, *columns)
    check_shapes({name: variable.shape for name, variable in arrays.items()}, expected, where)
    # A few equal vectors are aliases in any file; in bulk, aliases would let a small file fill the memory.
    claimed = sum(variable.nbytes for name, variable in arrays.items() if name != _OUTPUT)
    if claimed > 2 * size:
        raise CheckpointError(f"{where}: damaged: its tensors would take {claimed} bytes, the file has {size}")
    if arrays[_OUTPUT] != arrays[_EMBEDDING]:
        raise CheckpointError(f"{where}: not Whisper's architecture: {_OUTPUT} is not tied to {_EMBEDDING}")


def _read_tensors(file: ByteRange, dims: Dims, arrays: Mapping[str, Variable], where: Path) -> dict[str, torch.Tensor]:
    def part(location: tuple[str, int, int], shape: Shape) -> torch.Tensor:
        name, index, parts = location
        variable = arrays[name]
        tensor = file.read_tensor(variable.offset + index * (variable.nbytes // parts), shape, _FLOATS[variable.dtype])
        return check_values(name, tensor, where)

    tensors = {name: part(_locate(name), shape) for name, shape in tensor_shapes(dims).items()}
    for name in [name for name in tensors if name.endswith(".key.weight")]:
        variable, index, parts = _locate(name.replace(".weight", ".bias"))
        if torch.count_nonzero(part((variable, index, parts), (dims.n_audio_state,))):
            raise CheckpointError(f"{where}: not Whisper's architecture: {variable} has a bias for keys")
    return tensors
