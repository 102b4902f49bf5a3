"""The real machine: this project's encoder and slots in one process, and what they cost on a device.

Log-mel input lies on the device already; the feature extraction counts for nobody. What a window's text says does not
matter, only how long it is: the end of the text is suppressed, and a window's count of sampled tokens starts so far up
that it reaches the most there may be after as many tokens as the traffic asks for.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels.next_token import Field
from loadtest.batching.machines import Costs
from loadtest.batching.windows import MOST_TOKENS
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.encoder import Encoder
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens

INPUTS = 16
"""Different windows of noise, which take turns."""
OPTIONS = DecodeOptions(language="en", timestamps=False)


class EngineMachine:
    """encoder_batch: windows in one run of the encoder; larger batches are cut."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, *, slots: int, encoder_batch: int):
        dims = checkpoint.dims
        self.slots, self.encoder_batch = slots, encoder_batch
        vocabulary = Tokens(dims).vocabulary
        rules = replace(
            rules_of(vocabulary, dims),
            most_sampled=MOST_TOKENS,
            suppressed=tuple(sorted({*vocabulary.suppressed, vocabulary.end})),
        )
        self.encoder = Encoder(checkpoint, compute)
        self.decoder = SlotDecoder(checkpoint, compute, slots, rules, steps=1)
        generator = torch.Generator().manual_seed(0)
        shape = INPUTS, dims.n_mels, 2 * dims.n_audio_ctx
        noise = torch.randn(shape, generator=generator).mul_(0.3).clamp_(-1.0, 1.5)
        self._log_mel = noise.to(compute.device, compute.dtype)
        self._on_gpu = compute.device.type == "cuda"
        self._running: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._encoded: list[tuple[int, float]] = []
        self.begin()

    @property
    def active(self) -> int:
        return self.decoder.active

    @property
    def lag(self) -> int:
        """Steps for which a window that has ended holds its slot."""
        return self.decoder.lag

    def begin(self) -> None:
        self.decoder.cancel(self.decoder.window_ids)
        self.decoder.read()  # what was still under way
        self.finish()
        self._running.clear()
        self._encoded = []
        self._begun = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._begun

    def sleep_until(self, at: float) -> None:
        while (left := at - self.now()) > 0:
            time.sleep(left)

    def finish(self) -> None:
        """Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def encode(self, numbers: Sequence[int], tokens: Sequence[int]) -> None:
        for first in range(0, len(numbers), self.encoder_batch):
            part = numbers[first : first + self.encoder_batch]
            states = self._timed(self.inputs(part))
            row = self.decoder.active
            self.decoder.admit(
                [SlotTask(str(number), state, OPTIONS) for number, state in zip(part, states, strict=True)]
            )
            sampled = [MOST_TOKENS - count for count in tokens[first : first + self.encoder_batch]]
            self._write(slice(row, row + len(part)), torch.tensor(sampled, dtype=torch.int32))

    def inputs(self, numbers: Sequence[int]) -> Tensor:
        """The encoder's, of these windows."""
        return torch.stack([self._log_mel[number % INPUTS] for number in numbers])

    def _write(self, rows: slice, sampled: Tensor) -> None:
        if self._on_gpu:
            sampled = sampled.pin_memory()
        self.decoder.states[rows, Field.SAMPLED].copy_(sampled, non_blocking=True)

    def _timed(self, log_mel: Tensor) -> Tensor:
        if not self._on_gpu:
            begun = time.monotonic()
            states = self.encoder(log_mel)
            self._encoded.append((len(log_mel), time.monotonic() - begun))
            return states
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        states = self.encoder(log_mel)
        end.record()
        self._running.append((len(log_mel), begin, end))
        return states

    def step(self) -> list[int]:
        return [int(window_id) for window_id, _ in self.decoder.step()]

    def drain(self) -> None:
        while self.decoder.active:
            self.decoder.step()

    def encodings(self) -> list[tuple[int, float]]:
        while self._running and self._running[0][2].query():
            count, begin, end = self._running.popleft()
            self._encoded.append((count, begin.elapsed_time(end) / 1000))
        known, self._encoded = self._encoded, []
        return known


def measure(
    machine: EngineMachine, encoder_sizes: Sequence[int], step_sizes: Sequence[int], *, repeats: int, warm_up: int
) -> Costs:
    """Seconds of encodings, and of steps with so many slots in use that hold windows ``warm_up`` tokens on: medians of
    ``repeats``."""
    encoder = {}
    for size in encoder_sizes:
        log_mel = machine.inputs(range(size))
        encoder[size] = _seconds(partial(_encode, machine, log_mel), repeats)
    steps = {}
    for size in step_sizes:
        machine.begin()
        machine.encode(range(size), [MOST_TOKENS] * size)
        for _ in range(warm_up):
            machine.step()
        steps[size] = _seconds(machine.step, repeats)
    machine.begin()
    return Costs(encoder, steps, lag=machine.lag)


def _encode(machine: EngineMachine, log_mel: Tensor) -> None:
    machine.encoder(log_mel)
    machine.finish()


def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begun = time.monotonic()
        run()
        times.append(time.monotonic() - begun)
    return statistics.median(times)
