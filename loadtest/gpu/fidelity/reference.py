"""openai-whisper: what it chooses in FP32, which is right, and what it would choose after right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from whisper import log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import ModelDimensions, Whisper

from loadtest.identity import Samples
from serve_app.engine.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a file, and how it is decoded."""

    name: str
    file: str
    samples: Samples
    language: str
    prompt: str | None


@dataclass(frozen=True, slots=True)
class Right:
    """What openai-whisper chose in FP32, token by token, the end included where it came.

    logits: [steps, n_vocab] float32, after the rules. best_text: [steps], the largest logit of text that might be
    chosen there if timestamps together were not likelier."""

    chosen: list[int]
    logits: Tensor
    best_text: Tensor
    text: str


class Watched:
    """In place of openai-whisper's ``GreedyDecoder``, for one window: keeps what is chosen at each step and, where
    ``forced`` tokens are given, goes on with those instead."""

    def __init__(self, end: int, forced: Sequence[int] | None = None):
        self._end, self._forced = end, forced
        self.chosen: list[int] = []
        self.logits: list[Tensor] = []

    def reset(self) -> None:
        """Nothing is kept between windows."""

    def update(self, tokens: Tensor, logits: Tensor, sum_logprobs: Tensor) -> tuple[Tensor, bool]:
        chosen = int(logits[0].argmax())
        self.chosen.append(chosen)
        if self._forced is None:
            self.logits.append(logits[0].clone())
            following, done = chosen, chosen == self._end
        else:
            following, done = self._forced[len(self.chosen) - 1], len(self.chosen) == len(self._forced)
        return torch.cat([tokens, tokens.new_tensor([[following]])], dim=-1), done

    def finalize(self, tokens: Tensor, sum_logprobs: Tensor) -> tuple[Tensor, list[list[float]]]:
        return F.pad(tokens, (0, 1), value=self._end), sum_logprobs.tolist()


class BestText:
    """A logit filter that changes nothing: keeps the largest logit of text at each step, under the rules of timestamps
    but for the one that weighs text against all timestamps together, which finds none here."""

    def __init__(self, rules: Any, timestamp_begin: int):
        self._rules, self._timestamp_begin = rules, timestamp_begin
        self.kept: list[Tensor] = []

    def apply(self, logits: Tensor, tokens: Tensor) -> None:
        without = logits.clone()
        without[:, self._timestamp_begin :] = -torch.inf
        self._rules.apply(without, tokens)
        self.kept.append(without[0].max())


class Reference:
    """openai-whisper with a checkpoint's weights, as ``whisper.load_model`` leaves it: parameters in FP32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.model = Whisper(ModelDimensions(**asdict(checkpoint.dims)))
        self.model.load_state_dict(checkpoint.tensors)
        self.model.float().eval().to(device)
        self._device = device

    def right(self, window: Window) -> Right:
        """Its greedy choices in FP32."""
        task = self._task(window, fp16=False)
        watched = task.decoder = Watched(task.tokenizer.eot)
        *others, rules = task.logit_filters  # the last are those of timestamps
        best_text = BestText(rules, task.tokenizer.timestamp_begin)
        task.logit_filters = [*others, best_text, rules]
        [result] = task.run(self._log_mel(window))
        return Right(watched.chosen, torch.stack(watched.logits), torch.stack(best_text.kept), result.text)

    def forced(self, window: Window, right: Sequence[int], *, fp16: bool) -> list[int]:
        """What it would choose after each beginning of ``right``."""
        task = self._task(window, fp16=fp16)
        watched = task.decoder = Watched(task.tokenizer.eot, right)
        task.run(self._log_mel(window))
        return watched.chosen

    def _task(self, window: Window, *, fp16: bool) -> Any:
        return DecodingTask(self.model, DecodingOptions(fp16=fp16, language=window.language, prompt=window.prompt))

    def _log_mel(self, window: Window) -> Tensor:
        audio = pad_or_trim(window.samples.astype(np.float32) / 32768)
        log_mel: Tensor = log_mel_spectrogram(audio, self.model.dims.n_mels, device=self._device)
        return log_mel[None]


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """FP32 attention in full products; the fused kernels for it are made of shorter ones."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
    return context
