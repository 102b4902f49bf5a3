"""Hugging Face folders: ``config.json`` with ``model.safetensors``, or with ``model.safetensors.index.json`` and its
shards. Where both are there, the single file is read, as transformers does."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .files import MAX_JSON_BYTES, check_regular, read_json
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

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CONFIG = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
_OUTSIDE = {
    "positional_embedding": "embed_positions.weight",
    "token_embedding": "embed_tokens",
    "ln_post": "layer_norm",
    "ln": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
_INSIDE = {
    "attn_ln": "self_attn_layer_norm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "cross_attn.query": "encoder_attn.q_proj",
    "cross_attn.key": "encoder_attn.k_proj",
    "cross_attn.value": "encoder_attn.v_proj",
    "cross_attn.out": "encoder_attn.out_proj",
    "mlp_ln": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
}
_DTYPES = ("F32", "F16", "BF16")
_OUTPUT = "proj_out.weight"
_EMBEDDING = "model.decoder.embed_tokens.weight"


def load(folder: Path, name: str, source: str) -> Checkpoint:
    """A folder that ``WhisperForConditionalGeneration.save_pretrained`` wrote; the tensors are memory-mapped."""
    config_path = folder / "config.json"
    config = read_json(config_path)
    _check_config(config, config_path)
    dims = read_dims({key: config[theirs] for key, theirs in _CONFIG.items() if theirs in config}, config_path)
    tensors = _read_tensors(folder, dims)
    generation = folder / "generation_config.json"
    options = read_json(generation) if generation.exists() else {}
    heads = read_alignment_heads(options.get("alignment_heads"), dims, generation)
    return Checkpoint(name, dims, tensors, heads, source)


def _check_config(config: dict[str, Any], where: Path) -> None:
    if (kind := config.get("model_type")) != "whisper":
        raise CheckpointError(f"{where}: not a Whisper: model_type is {kind!r:.60}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantised weights cannot be read (quantization_config)")
    for key, value in (("activation_function", "gelu"), ("scale_embedding", False)):
        if (found := config.get(key, value)) != value:
            raise CheckpointError(f"{where}: not Whisper's architecture: {key} is {found!r:.60}, not {value!r}")


def stored_name(name: str) -> str:
    """What Hugging Face's checkpoints call a tensor, from openai-whisper's name for it."""
    side, rest = name.split(".", 1)
    if rest == "positional_embedding":
        return f"model.{side}.{_OUTSIDE[rest]}"
    module, kind = rest.rsplit(".", 1)
    if module.startswith("blocks."):
        _, layer, inside = module.split(".", 2)
        return f"model.{side}.layers.{layer}.{_INSIDE[inside]}.{kind}"
    return f"model.{side}.{_OUTSIDE[module]}.{kind}"


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A name with a folder in it could reach any file of the machine.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r:.120} is not the name of a safetensors file in this folder")
        if not (folder / name).exists():
            raise CheckpointError(f"{index}: names the shard {name}, which is missing")
    return [folder / name for name in names]


def _read_tensors(folder: Path, dims: Dims) -> dict[str, torch.Tensor]:
    """All tensors under openai-whisper's names; sizes are checked before any is read."""
    paths = _shards(folder)
    with ExitStack() as stack:
        files: dict[str, tuple[Any, str, Path]] = {}
        shapes: dict[str, Shape] = {}
        for path in paths:
            check_regular(path)
            _check_complete(path)
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a safetensors file, or a damaged one: {error}") from error
            for stored in sorted(file.keys()):
                # The bare WhisperModel is saved without the outer "model.".
                name = f"model.{stored}" if stored.startswith(("encoder.", "decoder.")) else stored
                if name in files:
                    raise CheckpointError(f"{path}: tensor {stored} occurs twice")
                view = file.get_slice(stored)
                if view.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {stored} is stored as {view.get_dtype()}; only {listed(_DTYPES)} can be read, "
                        "quantised weights cannot"
                    )
                files[name] = (file, stored, path)
                shapes[name] = tuple(view.get_shape())

        def tensor(name: str) -> torch.Tensor:
            file, stored, path = files[name]
            return check_values(stored, file.get_tensor(stored).contiguous(), path)

        expected = {stored_name(name): shape for name, shape in tensor_shapes(dims).items()}
        where = paths[0] if len(paths) == 1 else folder / INDEX
        tied = {_OUTPUT: shapes[_EMBEDDING]} if {_OUTPUT, _EMBEDDING} <= shapes.keys() else {}
        check_shapes(shapes, expected | tied, where)
        if tied and not torch.equal(tensor(_OUTPUT), tensor(_EMBEDDING)):
            raise CheckpointError(f"{where}: not Whisper's architecture: {_OUTPUT} is not tied to {_EMBEDDING}")
        return {name: tensor(stored_name(name)) for name in tensor_shapes(dims)}


def _check_complete(path: Path) -> None:
    """Says in which tensor a file ends early; whatever else is wrong is for safetensors to find.

    Layout: u64 length of a JSON header | header: name -> dtype, shape, data_offsets | data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file")
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated in the header: {length} bytes expected, {size - 8} present")
        try:
            header = json.loads(file.read(length))
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise CheckpointError(f"{path}: not a safetensors file, or its header is damaged") from None
    present = size - 8 - length
    if cut := [name for name, end in ends.items() if end > present]:
        first = min(cut, key=ends.__getitem__)
        raise CheckpointError(
            f"{path}: truncated in tensor {first:.120}: {max(ends.values())} bytes of data expected, {present} present"
        )
