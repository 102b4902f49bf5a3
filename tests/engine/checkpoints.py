"""Small random Whispers, written in every format by the tools that users have: openai-whisper's module and
``torch.save``, safetensors, and CTranslate2's own serialiser."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from ctranslate2.specs import WhisperSpec
from safetensors.torch import save_file

from serve_app.engine.checkpoint import Dims

Tensors = Mapping[str, torch.Tensor]

TINY = Dims(
    n_mels=80,
    n_audio_ctx=6,
    n_audio_state=8,
    n_audio_head=2,
    n_audio_layer=2,
    n_vocab=51865,
    n_text_ctx=4,
    n_text_state=8,
    n_text_head=4,
    n_text_layer=3,
)
ALIGNMENT_HEADS = [(1, 0), (2, 3)]


def module(dims: Dims) -> Any:
    return whisper.model.Whisper(whisper.model.ModelDimensions(**asdict(dims))).eval()


def random_tensors(dims: Dims = TINY, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values under the names and in the shapes of openai-whisper's own module."""
    return {name: tensor.clone() for name, tensor in _random_tensors(dims, dtype, seed).items()}


@cache
def _random_tensors(dims: Dims, dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    state = module(dims).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in state.items()}


def write_openai(path: Path, tensors: Tensors, dims: Dims = TINY) -> Path:
    torch.save({"dims": asdict(dims), "model_state_dict": dict(tensors)}, path)
    return path


HUGGINGFACE_NAMES = [
    ("blocks", "layers"),
    ("cross_attn_ln", "encoder_attn_layer_norm"),
    (".attn_ln", ".self_attn_layer_norm"),
    ("cross_attn", "encoder_attn"),
    (".attn.", ".self_attn."),
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    (".out.", ".out_proj."),
    ("mlp_ln", "final_layer_norm"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
    ("ln_post", "layer_norm"),
    ("decoder.ln.", "decoder.layer_norm."),
    ("token_embedding", "embed_tokens"),
    ("positional_embedding", "embed_positions.weight"),
]


def huggingface_name(name: str) -> str:
    for ours, theirs in HUGGINGFACE_NAMES:
        name = name.replace(ours, theirs)
    return f"model.{name}"


def huggingface_config(dims: Dims = TINY) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "activation_function": "gelu",
        "scale_embedding": False,
        "num_mel_bins": dims.n_mels,
        "d_model": dims.n_audio_state,
        "vocab_size": dims.n_vocab,
        "max_source_positions": dims.n_audio_ctx,
        "encoder_attention_heads": dims.n_audio_head,
        "encoder_layers": dims.n_audio_layer,
        "max_target_positions": dims.n_text_ctx,
        "decoder_attention_heads": dims.n_text_head,
        "decoder_layers": dims.n_text_layer,
    }


def write_huggingface(folder: Path, tensors: Tensors, dims: Dims = TINY, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(dims)))
    (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": ALIGNMENT_HEADS}))
    named = {huggingface_name(name): tensor for name, tensor in tensors.items()}
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(named)}
    for file in files:
        save_file({name: named[name] for name in named if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def ctranslate2_spec(tensors: Tensors, dims: Dims = TINY) -> WhisperSpec:
    """CTranslate2's description of the model, with query, key and value fused as its converter does."""
    spec = WhisperSpec(dims.n_audio_layer, dims.n_audio_head, dims.n_text_layer, dims.n_text_head)
    zeros = torch.zeros(dims.n_text_state, dtype=tensors["decoder.ln.bias"].dtype)

    def norm(layer: Any, name: str) -> None:
        layer.gamma, layer.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def linear(layer: Any, *names: str) -> None:
        layer.weight = torch.cat([tensors[f"{name}.weight"] for name in names])
        layer.bias = torch.cat([tensors.get(f"{name}.bias", zeros) for name in names])

    for layer, name in ((spec.encoder.conv1, "encoder.conv1"), (spec.encoder.conv2, "encoder.conv2")):
        linear(layer, name)
    norm(spec.encoder.layer_norm, "encoder.ln_post")
    norm(spec.decoder.layer_norm, "decoder.ln")
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = tensors["decoder.token_embedding.weight"]
    for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        part.position_encodings.encodings = tensors[f"{side}.positional_embedding"]
        for i, layer in enumerate(part.layer):
            block = f"{side}.blocks.{i}"
            norm(layer.self_attention.layer_norm, f"{block}.attn_ln")
            linear(layer.self_attention.linear[0], *(f"{block}.attn.{name}" for name in ("query", "key", "value")))
            linear(layer.self_attention.linear[1], f"{block}.attn.out")
            if side == "decoder":
                norm(layer.attention.layer_norm, f"{block}.cross_attn_ln")
                linear(layer.attention.linear[0], f"{block}.cross_attn.query")
                linear(layer.attention.linear[1], f"{block}.cross_attn.key", f"{block}.cross_attn.value")
                linear(layer.attention.linear[2], f"{block}.cross_attn.out")
            norm(layer.ffn.layer_norm, f"{block}.mlp_ln")
            linear(layer.ffn.linear_0, f"{block}.mlp.0")
            linear(layer.ffn.linear_1, f"{block}.mlp.2")
    spec.register_vocabulary([f"<{i}>" for i in range(dims.n_vocab)])
    spec.config.alignment_heads = ALIGNMENT_HEADS
    return spec


def save_ctranslate2(folder: Path, spec: Any, quantization: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    return folder


def write_ctranslate2(folder: Path, tensors: Tensors, dims: Dims = TINY, quantization: str | None = None) -> Path:
    return save_ctranslate2(folder, ctranslate2_spec(tensors, dims), quantization)


def same(a: Tensors, b: Tensors) -> bool:
    """Same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and np.array_equal(a[name].view(torch.uint8).numpy(), b[name].view(torch.uint8).numpy())
        for name in a
    )


@contextmanager
def memory_limit(extra: int = 256 * 2**20) -> Iterator[None]:
    """No more than ``extra`` bytes of address space above what the process has now; an allocation beyond fails."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
