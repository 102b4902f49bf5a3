"""The work that every system does on one GPU, and what a system is.

A window is 30 s of audio, given as log-mel input that already lies on the GPU: the feature extraction counts for
nobody. A system turns n windows into n × 128 tokens, encoder and decoder together: greedily, without timestamps, after
the start sequence of English transcription, under openai-whisper's own rules (``suppress_tokens="-1"``,
``suppress_blank``), with the end of the text suppressed besides, so that every window takes exactly 128 tokens. The
weights are random: Whisper's speed does not depend on what its weights say, only on their shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serve_app.engine.checkpoint import Dims
from serve_app.engine.checkpoint.form import tensor_shapes
from serve_app.engine.tokens import Tokens

WINDOW_S = 30.0
WINDOW_FRAMES = 3000
NEW_TOKENS = 128
SEED = 20251122
GAINS = {".query.weight": 2.0, ".cross_attn.out.weight": 0.5}


def _large(decoder_layers: int) -> Dims:
    return Dims(
        n_mels=128,
        n_audio_ctx=1500,
        n_audio_state=1280,
        n_audio_head=20,
        n_audio_layer=32,
        n_vocab=51866,
        n_text_ctx=448,
        n_text_state=1280,
        n_text_head=20,
        n_text_layer=decoder_layers,
    )


MODELS = {"large-v3": _large(32), "turbo": _large(4)}


class System(Protocol):
    """One system, made without arguments in a process of its own. name: as in the tables."""

    name: str

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        """Makes the model ready. state_dict: openai-whisper's names, on ``device``, in the dtype to compute in
        (float16, or float32 on a CPU). The caller drops it afterwards."""

    def run(self, log_mel: Tensor) -> Tensor:
        """log_mel: [n, n_mels, 3000], on the device, in the weights' dtype. Returns the tokens chosen after the start
        sequence, [n, 128] integers, on any device. Runs out of memory with an error; the next size may still come."""


@dataclass(frozen=True)
class Task:
    """The tokens around the work. prompt: the start sequence; suppressed: never chosen, the end of the text among
    them; suppressed_first: not chosen as the first token either."""

    prompt: tuple[int, ...]
    end: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @classmethod
    def of(cls, dims: Dims) -> Task:
        tokens = Tokens(dims)
        vocabulary = tokens.vocabulary
        return cls(
            prompt=tokens.start_sequence("en", "transcribe", timestamps=False),
            end=vocabulary.end,
            suppressed=tuple(sorted({*vocabulary.suppressed, vocabulary.end})),
            suppressed_first=vocabulary.blank,
        )


def random_weights(dims: Dims, device: torch.device, dtype: torch.dtype, seed: int = SEED) -> dict[str, Tensor]:
    """Weights under openai-whisper's names, the same for one kind of device and dtype.

    Every product keeps the variance of what enters it, so that the residual stream grows like the square root of the
    layers' number (to about 6 at 32 layers) and float16 holds everything. ``GAINS`` make attention prefer some tens of
    the 1,500 positions and keep positions and earlier tokens audible beside the sound: without them a window's tokens
    repeat, and no comparison of two systems' tokens would say much. Special tokens and timestamps are short vectors, so
    that text always wins: some systems take a pair of timestamps as a reason to go over a window once more.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    weights: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(dims).items():
        if name == "encoder.positional_embedding":
            weights[name] = _sinusoids(*shape).to(device, dtype)
        elif name == "decoder.positional_embedding":
            weights[name] = normal(shape, 0.3)
        elif name == "decoder.token_embedding.weight":
            weights[name] = normal(shape, dims.n_text_state**-0.5)
            weights[name][Task.of(dims).end :] *= 0.1
        elif len(shape) == 1:
            is_gain = name.endswith("weight")
            weights[name] = normal(shape, 0.02) + (1 if is_gain else 0)
        else:
            gain = math.prod(gain for part, gain in GAINS.items() if part in name)
            weights[name] = normal(shape, gain / math.sqrt(math.prod(shape[1:])))
    return weights


def _sinusoids(length: int, channels: int) -> Tensor:
    """The encoder's positions, as Whisper has them: [length, channels]."""
    rates = torch.exp(-math.log(10_000) / (channels // 2 - 1) * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def random_log_mel(n: int, dims: Dims, device: torch.device, dtype: torch.dtype, seed: int = SEED) -> Tensor:
    """n windows of noise, each of another colour, in the range of Whisper's log-mel input: [n, n_mels, 3000]."""
    generator = torch.Generator(device).manual_seed(seed)
    colour = torch.randn((n, dims.n_mels, 1), generator=generator, device=device)
    noise = torch.randn((n, dims.n_mels, WINDOW_FRAMES), generator=generator, device=device)
    return (0.5 * colour + 0.3 * noise).clamp(-1.0, 1.5).to(dtype)


def check_tokens(tokens: Tensor, n: int, task: Task) -> None:
    """Raises ValueError where the work was not done: each of n windows has 128 tokens of text that may be chosen."""
    if tuple(tokens.shape) != (n, NEW_TOKENS):
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}, not {(n, NEW_TOKENS)}")
    if tokens.is_floating_point() or int(tokens.min()) < 0 or int(tokens.max()) >= task.end:
        raise ValueError("some tokens are not text")
    if bool(torch.isin(tokens, torch.tensor(task.suppressed, device=tokens.device)).any()):
        raise ValueError("some tokens are suppressed ones")
