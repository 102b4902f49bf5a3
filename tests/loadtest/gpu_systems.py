"""A small Whisper and systems of every kind of conduct, for the measurements on one GPU."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import torch
from torch import Tensor

from loadtest.gpu.work import MODELS, NEW_TOKENS
from serve_app.engine.checkpoint import Dims

SMALL = replace(
    MODELS["turbo"], n_audio_state=64, n_text_state=64, n_audio_head=2, n_text_head=2, n_audio_layer=2, n_text_layer=2
)


class Good:
    name = "good"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        self.dims = dims

    def run(self, log_mel: Tensor) -> Tensor:
        return torch.full((len(log_mel), NEW_TOKENS), 1000)


class Short(Good):
    """Chooses too few tokens for two windows or more."""

    def run(self, log_mel: Tensor) -> Tensor:
        return super().run(log_mel)[:, : NEW_TOKENS if len(log_mel) == 1 else 5]


class Greedy(Good):
    """Has no memory for four windows."""

    def run(self, log_mel: Tensor) -> Tensor:
        if len(log_mel) >= 4:
            raise RuntimeError("CUDA failed with error out of memory")
        return super().run(log_mel)


class Crashing(Good):
    """Ends its process at two windows."""

    def run(self, log_mel: Tensor) -> Tensor:
        if len(log_mel) == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().run(log_mel)


class Hanging(Good):
    def run(self, log_mel: Tensor) -> Tensor:
        if len(log_mel) == 2:
            time.sleep(600)
        return super().run(log_mel)


class Unloadable(Good):
    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        raise ImportError("the library is not here")
