"""This project's engine in one process, as a system of ``loadtest.gpu``: encoder, then all windows in slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
from serve_app.engine.states import Bits
from serve_app.engine.tokens import Tokens

SLOTS = 256
ENCODER_BATCH = 32


class Engine:
    name = "whisper-serve engine"
    precision = "float16"
    state_bits: Bits = 16

    def load(self, dims: Dims, state_dict: dict[str, Tensor], device: torch.device) -> None:
        compute = Compute.resolve(device.type, self.precision if device.type == "cuda" else "float32")
        checkpoint = Checkpoint("random", dims, state_dict, alignment_heads=None, source="random")
        self.encoder = Encoder(checkpoint, compute)
        vocabulary = Tokens(dims).vocabulary
        rules = replace(rules_of(vocabulary, dims), most_sampled=NEW_TOKENS, suppressed=Task.of(dims).suppressed)
        self.slots = SlotDecoder(checkpoint, compute, SLOTS, rules, state_bits=self.state_bits)

    def run(self, log_mel: Tensor) -> Tensor:
        options = DecodeOptions(language="en", timestamps=False)
        for first in range(0, len(log_mel), ENCODER_BATCH):
            states = self.encoder(log_mel[first : first + ENCODER_BATCH])
            self.slots.admit([SlotTask(str(first + i), state, options) for i, state in enumerate(states)])
        tokens: dict[str, list[int]] = {}
        while self.slots.active:
            tokens |= {window_id: window.tokens for window_id, window in self.slots.step()}
        return torch.tensor([tokens[str(i)] for i in range(len(log_mel))])


class EngineBytes(Engine):
    """With encoder states in bytes, of which a step reads half as many; for GPUs alone."""

    name = "whisper-serve engine, encoder states in bytes"
    state_bits: Bits = 8


class EngineOverlapped(Engine):
    """A variant for comparison: the encoder works on a stream beside the decoder's, which goes first, while windows
    before are decoded. The product's stages are processes of their own, and take turns."""

    name = "whisper-serve engine, stages overlapped (variant)"

    AHEAD = 2  # encoder batches on their way
    BATCH = 16

    def run(self, log_mel: Tensor) -> Tensor:
        if not log_mel.is_cuda:  # without streams nothing overlaps
            return super().run(log_mel)
        options = DecodeOptions(language="en", timestamps=False)
        here = torch.cuda.current_stream()
        encoding, decoding = torch.cuda.Stream(priority=0), torch.cuda.Stream(priority=-1)
        encoding.wait_stream(here)
        decoding.wait_stream(here)
        tokens: dict[str, list[int]] = {}
        batches = self._encoded(log_mel, encoding)
        ahead = deque(next(batches) for _ in range(min(self.AHEAD, -(-len(log_mel) // self.BATCH))))
        with torch.cuda.stream(decoding):
            while ahead or self.slots.active:
                # a batch enters when it is done and there is room; where nothing else is to do, it is waited for
                while ahead and self.slots.free >= len(ahead[0][1]) and (not self.slots.active or ahead[0][2].query()):
                    first, states, done = ahead.popleft()
                    decoding.wait_event(done)
                    states.record_stream(decoding)
                    self.slots.admit([SlotTask(str(first + i), state, options) for i, state in enumerate(states)])
                    ahead.extend(batch for batch in (next(batches, None),) if batch is not None)
                tokens |= {window_id: window.tokens for window_id, window in self.slots.step()}
        here.wait_stream(decoding)
        return torch.tensor([tokens[str(i)] for i in range(len(log_mel))])

    def _encoded(self, log_mel: Tensor, stream: torch.cuda.Stream) -> Iterator[tuple[int, Tensor, torch.cuda.Event]]:
        """Launches a batch whenever it is asked for one: its first window, the states, and when they are done."""
        for first in range(0, len(log_mel), self.BATCH):
            with torch.cuda.stream(stream):
                states = self.encoder(log_mel[first : first + self.BATCH])
                done = torch.cuda.Event()
                done.record()
            yield first, states, done


class EngineFloat32(Engine):
    """In plain PyTorch with FP32 products, without TF32: what FP16 is compared with."""

    name = "whisper-serve engine, FP32"
    precision = "float32"
