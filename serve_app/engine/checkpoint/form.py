"""The one internal form of a checkpoint, and the checks that every format must pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

Shape = tuple[int, ...]

# As openai-whisper's tokenizers have it: any other size would shift the special tokens.
VOCABULARIES = {51864: "English-only", 51865: "multilingual", 51866: "multilingual with Cantonese (large-v3)"}
MEL_BANDS = (80, 128)
# Far above any Whisper, and small enough that forged sizes cost neither memory nor time.
MAX_LAYERS = 256
MAX_SIZE = 2**20

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Dims:
    """Sizes of a Whisper, under openai-whisper's names (``whisper.model.ModelDimensions``)."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int

    @property
    def multilingual(self) -> bool:
        return self.n_vocab >= 51865

    @property
    def num_languages(self) -> int:
        return self.n_vocab - 51765 - int(self.multilingual)


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one Whisper, whatever file they came from.

    name: "base", "tiny.en", or the name of the file or folder.
    tensors: what ``whisper.model.Whisper(dims).load_state_dict(tensors, strict=True)`` takes; contiguous, on the CPU,
        in the dtype stored (float32, float16 or bfloat16), every value finite. They may be memory-mapped: change
        neither them nor the file while they are in use. ``encoder.positional_embedding`` is as stored: half-precision
        files hold the sinusoids to half precision (within 5e-4), and openai-whisper, too, uses them so once it has
        loaded such a file; computing them afresh could change tokens.
    alignment_heads: (layer, head) of the decoder's cross-attention heads that follow the audio, or None if the
        checkpoint does not say.
    source: what ``load`` was asked for.
    """

    name: str
    dims: Dims
    tensors: dict[str, torch.Tensor]
    alignment_heads: list[tuple[int, int]] | None
    source: str


def read_dims(values: Mapping[str, object], where: Path) -> Dims:
    """Dims from untrusted values, one for each of ``Dims``' fields: positive, bounded and consistent."""
    names = [field.name for field in fields(Dims)]
    if missing := [name for name in names if name not in values]:
        raise CheckpointError(f"{where}: the model's dimensions lack {listed(missing)}")
    sizes: dict[str, int] = {}
    for name in names:
        value = values[name]
        limit = MAX_LAYERS if name.endswith("_layer") else MAX_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise CheckpointError(f"{where}: {name} is {value!r:.60}, not a whole number from 1 to {limit}")
        sizes[name] = value
    dims = Dims(**sizes)
    for side in ("audio", "text"):
        state, heads = sizes[f"n_{side}_state"], sizes[f"n_{side}_head"]
        if state % heads:
            raise CheckpointError(f"{where}: {heads} {side} heads do not divide a state of {state}")
    if dims.n_audio_state != dims.n_text_state:
        raise CheckpointError(
            f"{where}: the encoder's state ({dims.n_audio_state}) and the decoder's ({dims.n_text_state}) differ"
        )
    if dims.n_vocab not in VOCABULARIES:
        known = ", ".join(f"{size} ({what})" for size, what in VOCABULARIES.items())
        raise CheckpointError(f"{where}: a vocabulary of {dims.n_vocab} is not Whisper's: {known}")
    if dims.n_mels not in MEL_BANDS:
        raise CheckpointError(f"{where}: {dims.n_mels} mel bands are not Whisper's (80 or 128)")
    return dims


def read_alignment_heads(value: object, dims: Dims, where: Path) -> list[tuple[int, int]] | None:
    """(layer, head) pairs from untrusted JSON; None stays None."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: alignment_heads is not a list")
    heads = []
    for pair in value:
        match pair:
            case [int(layer), int(head)] if 0 <= layer < dims.n_text_layer and 0 <= head < dims.n_text_head:
                heads.append((layer, head))
            case _:
                raise CheckpointError(
                    f"{where}: alignment_heads has {pair!r:.60}; the decoder has {dims.n_text_layer} layers of "
                    f"{dims.n_text_head} heads"
                )
    return heads


def tensor_shapes(dims: Dims) -> dict[str, Shape]:
    """Name and shape of every tensor in ``whisper.model.Whisper(dims).state_dict()``."""
    d = dims.n_audio_state
    shapes: dict[str, Shape] = {
        "encoder.positional_embedding": (dims.n_audio_ctx, d),
        "encoder.conv1.weight": (d, dims.n_mels, 3),
        "encoder.conv1.bias": (d,),
        "encoder.conv2.weight": (d, d, 3),
        "encoder.conv2.bias": (d,),
        "encoder.ln_post.weight": (d,),
        "encoder.ln_post.bias": (d,),
        "decoder.token_embedding.weight": (dims.n_vocab, d),
        "decoder.positional_embedding": (dims.n_text_ctx, d),
        "decoder.ln.weight": (d,),
        "decoder.ln.bias": (d,),
    }
    for side, layers in (("encoder", dims.n_audio_layer), ("decoder", dims.n_text_layer)):
        attentions = ("attn",) if side == "encoder" else ("attn", "cross_attn")
        for layer in range(layers):
            block = f"{side}.blocks.{layer}"
            for attention in attentions:
                for linear in ("query", "key", "value", "out"):
                    shapes[f"{block}.{attention}.{linear}.weight"] = (d, d)
                    if linear != "key":
                        shapes[f"{block}.{attention}.{linear}.bias"] = (d,)
            for norm in (*(f"{attention}_ln" for attention in attentions), "mlp_ln"):
                shapes[f"{block}.{norm}.weight"] = (d,)
                shapes[f"{block}.{norm}.bias"] = (d,)
            shapes[f"{block}.mlp.0.weight"] = (4 * d, d)
            shapes[f"{block}.mlp.0.bias"] = (4 * d,)
            shapes[f"{block}.mlp.2.weight"] = (d, 4 * d)
            shapes[f"{block}.mlp.2.bias"] = (d,)
    return shapes


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: Path) -> None:
    """The file holds just the tensors of a Whisper with these dims. Both sides under the file's own names, so that the
    message can be looked up in the file."""
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{where}: tensors missing: {listed(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        raise CheckpointError(f"{where}: tensors that no Whisper of these dimensions has: {listed(unexpected)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {found[name]}, while the model's dimensions ask for {shape}"
            )


def check_values(name: str, tensor: torch.Tensor, where: Path) -> torch.Tensor:
    """The tensor itself, if its dtype is one of Whisper's and all its values are finite."""
    if tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{where}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; only float32, float16 and "
            "bfloat16 weights can be read, quantised ones cannot"
        )
    # Both carry any NaN or infinity, and cost a tenth of isfinite over all values.
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(f"{where}: {name} has {bad} values that are NaN or infinite")
    return tensor


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names for a message, the rest counted."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(f"{name:.120}" for name in names[:most]) + (f" and {rest} more" if rest > 0 else "")
