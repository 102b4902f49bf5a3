"""This project's engine in one process, as a system of ``loadtest.gpu``: encoder, then all windows in slots."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loadtest.gpu.work import NEW_TOKENS, Task
from serve_app.engine.checkpoint import Checkpoint, Dims
from serve_app.engine.encoder import Encoder
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens

SLOTS = 256
ENCODER_BATCH = 32


class Engine:
    name = "whisper-serve engine"
    precision = "float16"

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        compute = Compute.resolve(device.type, self.precision if device.type == "cuda" else "float32")
        checkpoint = Checkpoint("random", dims, state_dict, alignment_heads=None, source="random")
        self.encoder = Encoder(checkpoint, compute)
        vocabulary = Tokens(dims).vocabulary
        rules = replace(rules_of(vocabulary, dims), most_sampled=NEW_TOKENS, suppressed=Task.of(dims).suppressed)
        self.slots = SlotDecoder(checkpoint, compute, SLOTS, rules)

    def run(self, log_mel: Tensor) -> Tensor:
        options = DecodeOptions(language="en", timestamps=False)
        for first in range(0, len(log_mel), ENCODER_BATCH):
            states = self.encoder(log_mel[first : first + ENCODER_BATCH])
            self.slots.admit([SlotTask(str(first + i), state, options) for i, state in enumerate(states)])
        tokens: dict[str, list[int]] = {}
        while self.slots.active:
            tokens |= {window_id: window.tokens for window_id, window in self.slots.step()}
        return torch.tensor([tokens[str(i)] for i in range(len(log_mel))])


class EngineFloat32(Engine):
    """In plain PyTorch with FP32 products, without TF32: what FP16 is compared with."""

    name = "whisper-serve engine, FP32"
    precision = "float32"
