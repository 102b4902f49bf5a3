"""In-flight batching: windows enter free slots between steps and leave when they end, whatever the others do.

This is the host's side of decoding. It is driven step by step by one thread: ``admit``, ``step``, ``cancel``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.decoder import Decoder
from serve_app.engine.fallback import DecodedWindow, quality
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import Rules, RuleState
from serve_app.engine.tokens import Tokens


@dataclass(frozen=True, slots=True)
class SlotTask:
    """A window to decode. state: its encoder state [1500, d]."""

    window_id: str
    state: Tensor
    options: DecodeOptions


@dataclass(slots=True)
class _Slot:
    """A window in progress. ``length`` tokens are in the cache; ``pending`` waits for its start sequence to be run."""

    task: SlotTask
    language: str | None
    attempt: int = 0  # index of the temperature
    pending: bool = True
    length: int = 0
    sampled: list[int] = field(default_factory=list)
    sum_logprob: float = 0.0
    no_speech_prob: float = 0.0
    generator: torch.Generator | None = None
    best: DecodedWindow | None = None  # of the attempts that failed the checks

    @property
    def temperature(self) -> float:
        return self.task.options.temperatures[self.attempt]


class SlotDecoder:
    """Decodes up to ``slots`` windows at once. Occupied slots are always 0..n-1, so that a step is dense."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int):
        self.decoder = Decoder(checkpoint, compute, slots)
        self.tokens = Tokens(checkpoint.dims)
        self.rules = Rules(self.tokens.vocabulary, checkpoint.dims.n_vocab, compute.device)
        self._state = RuleState(slots, compute.device)
        self._slots: list[_Slot] = []
        self._device = compute.device
        self._n_ctx = checkpoint.dims.n_text_ctx

    @property
    def active(self) -> int:
        return len(self._slots)

    @property
    def window_ids(self) -> set[str]:
        """The windows in the slots."""
        return {slot.task.window_id for slot in self._slots}

    @property
    def free(self) -> int:
        return self.decoder.slots - len(self._slots)

    @torch.inference_mode()
    def admit(self, tasks: Sequence[SlotTask]) -> None:
        """Takes windows into free slots; more than there are is a ValueError."""
        if len(tasks) > self.free:
            raise ValueError(f"{len(tasks)} windows for {self.free} free slots")
        for task in tasks:
            self.decoder.load(len(self._slots), task.state)
            self._slots.append(_Slot(task, task.options.language if self.tokens.multilingual else "en"))

    @torch.inference_mode()
    def cancel(self, window_ids: Collection[str]) -> None:
        """Frees the slots of these windows; unknown ids are ignored (they have just ended)."""
        for row in reversed(range(len(self._slots))):
            if self._slots[row].task.window_id in window_ids:
                self._release(row)

    @torch.inference_mode()
    def step(self) -> list[tuple[str, DecodedWindow]]:
        """Advances every occupied slot by one token, and runs the start sequences of new ones; returns what ended."""
        for rows in _runs([row for row, slot in enumerate(self._slots) if slot.pending]):
            self._start(rows)
        done = self._collect()
        if self._slots and not any(slot.pending for slot in self._slots):
            self._advance()
            done += self._collect()
        return done

    def _start(self, rows: slice) -> None:
        """Detects the language where it is not given, runs the start sequences and samples the first tokens."""
        slots = self._slots[rows]
        vocabulary = self.tokens.vocabulary
        zero = torch.zeros(len(slots), dtype=torch.int64, device=self._device)
        if any(slot.language is None for slot in slots):
            start = torch.full((len(slots), 1), vocabulary.start, device=self._device)
            logits = self.decoder.logits(self.decoder.forward(start, rows, zero)[:, 0])
            for slot, language in zip(slots, self.rules.detect_language(logits), strict=True):
                slot.language = slot.language or language

        sequences = [self._start_sequence(slot) for slot in slots]
        longest = max(map(len, sequences))
        tokens = [[*sequence, *[vocabulary.end] * (longest - len(sequence))] for sequence in sequences]
        hidden = self.decoder.forward(torch.tensor(tokens, device=self._device), rows, zero)
        index = torch.arange(len(slots), device=self._device)
        starts = torch.tensor([sequence.index(vocabulary.start) for sequence in sequences], device=self._device)
        lasts = torch.tensor([len(sequence) - 1 for sequence in sequences], device=self._device)
        at_start, at_last = self.decoder.logits(torch.stack([hidden[index, starts], hidden[index, lasts]]))
        no_speech = at_start.softmax(dim=-1)[:, vocabulary.no_speech].tolist()
        for row, slot, sequence, probability in zip(
            range(rows.start, rows.stop), slots, sequences, no_speech, strict=True
        ):
            slot.no_speech_prob, slot.length, slot.pending = probability, len(sequence), False
            slot.sampled, slot.sum_logprob, slot.generator = [], 0.0, self._generator(slot)
            self._state.start(row, timestamps=slot.task.options.timestamps, temperature=slot.temperature)
        self._choose(at_last, rows)

    def _start_sequence(self, slot: _Slot) -> tuple[int, ...]:
        assert slot.language is not None
        options = slot.task.options
        start = self.tokens.start_sequence(slot.language, options.task, timestamps=options.timestamps)
        return (*self.tokens.prompt(options.prompt), *start)

    def _generator(self, slot: _Slot) -> torch.Generator | None:
        if slot.temperature == 0:
            return None
        return torch.Generator(self._device).manual_seed(slot.task.options.seed + slot.attempt)

    def _advance(self) -> None:
        rows = slice(0, len(self._slots))
        last = torch.tensor([[slot.sampled[-1]] for slot in self._slots], device=self._device)
        starts = torch.tensor([slot.length for slot in self._slots], device=self._device)
        logits = self.decoder.logits(self.decoder.forward(last, rows, starts)[:, 0])
        for slot in self._slots:
            slot.length += 1
        self._choose(logits, rows)

    def _choose(self, logits: Tensor, rows: slice) -> None:
        slots = self._slots[rows]
        tokens, logprobs = self.rules.choose(logits, self._state, rows, [slot.generator for slot in slots])
        for slot, token, logprob in zip(slots, tokens.tolist(), logprobs.tolist(), strict=True):
            slot.sampled.append(token)
            slot.sum_logprob += logprob

    def _collect(self) -> list[tuple[str, DecodedWindow]]:
        """Takes finished windows out of their slots; those that fail the checks start again, hotter."""
        done = []
        for row in reversed(range(len(self._slots))):
            slot = self._slots[row]
            if slot.pending or not self._is_finished(slot):
                continue
            result = self._result(slot)
            if not result.is_acceptable:
                slot.best = result = max(filter(None, (slot.best, result)), key=quality)
                if slot.attempt + 1 < len(slot.task.options.temperatures):
                    slot.attempt += 1
                    slot.pending = True
                    continue
            done.append((slot.task.window_id, result))
            self._release(row)
        return done

    def _is_finished(self, slot: _Slot) -> bool:
        # openai-whisper's limits: half the context, and one token past its end
        full = len(slot.sampled) == self._n_ctx // 2 or slot.length >= self._n_ctx
        return slot.sampled[-1] == self.tokens.vocabulary.end or full

    def _result(self, slot: _Slot) -> DecodedWindow:
        tokens = slot.sampled[:-1] if slot.sampled[-1] == self.tokens.vocabulary.end else slot.sampled
        assert slot.language is not None
        return DecodedWindow(
            tokens=tokens,
            text=self.tokens.text(tokens).strip(),
            language=slot.language,
            temperature=slot.temperature,
            avg_logprob=slot.sum_logprob / (len(tokens) + 1),
            no_speech_prob=slot.no_speech_prob,
        )

    def _release(self, row: int) -> None:
        """Fills the freed slot with the last one, so that occupied slots stay dense."""
        last = len(self._slots) - 1
        if row != last:
            self.decoder.move(last, row, self._slots[last].length)
            self._state.move(last, row)
            self._slots[row] = self._slots[last]
        self._slots.pop()


def _runs(rows: list[int]) -> list[slice]:
    """Ascending row numbers as contiguous ranges."""
    runs: list[slice] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs
