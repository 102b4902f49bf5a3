"""The engine, from samples to tokens: by itself, and after right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.next_token import Field, idle_states, new_state
from loadtest.gpu.fidelity.reference import Window
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.encoder import Encoder
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.states import Bits
from serve_app.engine.tokens import Tokens


def forced_states(
    start: Sequence[int], sampled: Sequence[int], *, position: int, timestamp_begin: int
) -> list[list[int]]:
    """A slot's states before each of its steps, as if it had taken the start sequence and chosen just these tokens
    (pure): one for each token of the start, and one after each of ``sampled`` but the last. position: of the first."""
    state = new_state(start, position=position, timestamps=True, temperature=0.0, seed=0)
    state[Field.TOKEN] = start[0]
    states = [state]
    for before, token in pairwise([*start, *sampled[:-1]]):
        state = list(states[-1])
        state[Field.POSITION] += 1
        state[Field.STEP] += 1
        state[Field.TOKEN] = token
        if state[Field.STEP] >= len(start):
            index = token - timestamp_begin
            state[Field.SAMPLED] += 1
            state[Field.LAST_IS_TIMESTAMP] = int(index >= 0)
            state[Field.BEFORE_IS_TIMESTAMP] = int(state[Field.SAMPLED] == 1 or before >= timestamp_begin)
            state[Field.LAST_TIMESTAMP] = index if index >= 0 else state[Field.LAST_TIMESTAMP]
        states.append(state)
    return states


class Engine:
    """This project's, from samples to tokens, in slots."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int, state_bits: Bits = 16):
        self.compute, self.tokens = compute, Tokens(checkpoint.dims)
        self._log_mel, self._encoder = LogMel(checkpoint.dims.n_mels, compute), Encoder(checkpoint, compute)
        self._slots = SlotDecoder(checkpoint, compute, slots, state_bits=state_bits, steps=1)

    def encode(self, windows: Sequence[Window]) -> Tensor:
        return self._encoder(self._log_mel([window.samples for window in windows]))

    def free(self, windows: Sequence[Window], states: Tensor) -> list[DecodedWindow]:
        """What it writes by itself, at temperature 0, as openai-whisper does here."""
        self._slots.admit(
            [
                SlotTask(window.name, state, DecodeOptions(language=window.language, prompt=window.prompt))
                for window, state in zip(windows, states, strict=True)
            ]
        )
        done: dict[str, DecodedWindow] = {}
        while self._slots.active:
            done.update(self._slots.step())
        return [done[window.name] for window in windows]

    @torch.inference_mode()
    def forced(self, windows: Sequence[Window], states: Tensor, right: Sequence[Sequence[int]]) -> list[list[int]]:
        """What it would choose after each beginning of the right tokens, in the steps that decoding takes."""
        n, decoder, begins, tables = len(windows), self._slots.decoder, [], []
        timestamp_begin = self.tokens.vocabulary.timestamp_begin
        for row, (window, state, tokens) in enumerate(zip(windows, states, right, strict=True)):
            prompt = self.tokens.prompt(window.prompt)
            decoder.load([row], [state])
            if prompt:
                decoder.prefill(row, prompt)
            start = self.tokens.start_sequence(window.language, "transcribe", timestamps=True)
            tables.append(forced_states(start, tokens, position=len(prompt), timestamp_begin=timestamp_begin))
            begins.append(len(start) - 1)
        idle = idle_states(1, torch.device("cpu"))[0].tolist()
        steps = max(map(len, tables))
        table = torch.tensor([states + [idle] * (steps - len(states)) for states in tables], dtype=torch.int32)
        table = table.to(self.compute.device)
        chosen = torch.empty(n, steps, dtype=torch.int32, device=self.compute.device)
        for step in range(steps):
            self._slots.states[:n] = table[:, step]
            self._slots.advance(n)
            chosen[:, step] = self._slots.states[:n, Field.TOKEN]
        self._slots.states[:, Field.FINISHED] = 1
        return [
            row[begin : begin + len(tokens)] for row, begin, tokens in zip(chosen.tolist(), begins, right, strict=True)
        ]
