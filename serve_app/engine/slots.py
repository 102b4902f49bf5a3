"""In-flight batching: windows enter free slots between steps and leave when they end, whatever the others do.

This is the host's side of decoding. It is driven step by step by one thread: ``admit``, ``step``, ``cancel``. The
device keeps what a step needs of each slot (``kernels.next_token.Field``), so that on a GPU the host starts a step
before it has seen the last one's tokens: it looks one step behind, and the GPU never waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from kernels import persistent_step
from kernels.next_token import DETECT, Field, NextToken, Rules, idle_states, new_state
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.decoder import Decoder
from serve_app.engine.fallback import DecodedWindow, quality
from serve_app.engine.graphs import SizedGraphs, buckets
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.tokens import Tokens


@dataclass(frozen=True, slots=True)
class SlotTask:
    """A window to decode. state: its encoder state [1500, d]."""

    window_id: str
    state: Tensor
    options: DecodeOptions


@dataclass(eq=False, slots=True)
class _Slot:
    """A window in progress."""

    task: SlotTask
    row: int
    prompt: tuple[int, ...]
    position: int  # as last seen: so much of the context is computed
    attempt: int = 0  # index of the temperature
    released: bool = False
    is_ready: bool = False  # has keys and values in its row
    sampled: list[int] = field(default_factory=list)
    best: DecodedWindow | None = None  # of the attempts that failed the checks

    @property
    def temperature(self) -> float:
        return self.task.options.temperatures[self.attempt]


@dataclass(frozen=True, slots=True)
class _Report:
    """The slots' states after a step, once they have arrived on the host, and whose they are: slot and attempt."""

    slots: list[tuple[_Slot, int]]
    states: Tensor
    arrived: torch.cuda.Event | None


class SlotDecoder:
    """Decodes up to ``slots`` windows at once. Occupied slots are always 0..n-1, so that a step is dense."""

    @torch.inference_mode()
    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int, rules: Rules | None = None):
        """rules: of choosing tokens, where they are not to be Whisper's own."""
        self.decoder = Decoder(checkpoint, compute, slots)
        self.tokens = Tokens(checkpoint.dims)
        vocabulary = self.tokens.vocabulary
        self._choose = NextToken(rules or rules_of(vocabulary, checkpoint.dims), compute.device, slots)
        self.states = idle_states(slots, compute.device)
        self._languages = {token: code for code, token in vocabulary.languages.items()}
        self._slots: list[_Slot] = []
        self._reports: deque[_Report] = deque()
        self._on_gpu = compute.device.type == "cuda"
        self.advance = SizedGraphs(self._step, buckets(slots)) if compute.has_kernels else self._step
        few = [n for n in persistent_step.SLOTS if n <= self.decoder.few]
        self.advance_few = SizedGraphs(self._step_few, few) if few else None
        # on a GPU a step is running while the one before is read
        self._lag = 1 if self._on_gpu else 0

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
        entered = []
        for row, task in enumerate(tasks, start=len(self._slots)):
            prompt = self.tokens.prompt(task.options.prompt)
            slot = _Slot(task, row, prompt, position=len(prompt))
            self.decoder.load(row, task.state)
            if slot.prompt:
                self.decoder.prefill(row, slot.prompt)
            entered.append(slot)
        self._slots += entered
        self._begin(entered)

    @torch.inference_mode()
    def cancel(self, window_ids: Collection[str]) -> None:
        """Frees the slots of these windows; unknown ids are ignored (they have just ended)."""
        for slot in [slot for slot in self._slots if slot.task.window_id in window_ids]:
            self._release(slot)

    @torch.inference_mode()
    def step(self) -> list[tuple[str, DecodedWindow]]:
        """Advances every occupied slot by one token; returns what has ended."""
        if self._slots:
            self._start_step()
            self._reports.append(self._report())
        done: list[tuple[str, DecodedWindow]] = []
        while len(self._reports) > self._lag:
            done += self._read(self._reports.popleft())
        return done

    @torch.inference_mode()
    def settle(self) -> list[tuple[str, DecodedWindow]]:
        """Waits until the device has done all that was started; returns what has ended."""
        done: list[tuple[str, DecodedWindow]] = []
        while self._reports:
            done += self._read(self._reports.popleft())
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()  # what reading them has started: slots that move
        return done

    def _start_step(self) -> None:
        n = len(self._slots)
        if self.advance_few is None or n > self.decoder.few:
            self.advance(n)
            return
        for slot in self._slots:
            if not slot.is_ready:
                self.decoder.ready(slot.row)
                slot.is_ready = True
        self.advance_few(n)

    def _step_few(self, n: int) -> None:
        """As ``_step``."""
        states = self.states[:n]
        self._choose(self.decoder.step_few(states[:, Field.TOKEN], states[:, Field.POSITION]), states)

    def _step(self, n: int) -> None:
        """One step of the first n slots, on the device."""
        states = self.states[:n]
        logits = self.decoder.step(states[:, Field.TOKEN], states[:, Field.POSITION])
        self._choose(logits, states)

    def _begin(self, slots: Sequence[_Slot]) -> None:
        """Writes the first state of slots in neighbouring rows. Their prompts are in the caches already."""
        if not slots:
            return
        states = torch.tensor([self._first_state(slot) for slot in slots], dtype=torch.int32)
        if self._on_gpu:
            states = states.pin_memory()
        self.states[slots[0].row : slots[-1].row + 1].copy_(states, non_blocking=True)

    def _first_state(self, slot: _Slot) -> list[int]:
        options = slot.task.options
        start = list(self.tokens.start_sequence(options.language or "en", options.task, timestamps=options.timestamps))
        if self.tokens.multilingual and options.language is None:
            start[1] = DETECT
        return new_state(
            start,
            position=len(slot.prompt),
            timestamps=options.timestamps,
            temperature=slot.temperature,
            seed=options.seed + slot.attempt,
        )

    def _report(self) -> _Report:
        states = self.states[: len(self._slots)]
        arrived = None
        if self._on_gpu:
            host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            states = host.copy_(states, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            arrived.record()
        return _Report([(slot, slot.attempt) for slot in self._slots], states, arrived)

    def _read(self, report: _Report) -> list[tuple[str, DecodedWindow]]:
        """Takes a step's tokens in, and finished windows out of their slots; those that fail the checks start again,
        hotter."""
        if report.arrived is not None:
            report.arrived.synchronize()
        done = []
        fields = Field.POSITION, Field.SAMPLED, Field.TOKEN, Field.FINISHED
        columns = report.states.T.numpy()[list(fields)].tolist()
        rows = zip(report.slots, *columns, strict=True)
        for row, ((slot, attempt), position, sampled, token, finished) in enumerate(rows):
            if slot.released or slot.attempt != attempt:
                continue
            slot.position = position
            if sampled > len(slot.sampled):
                slot.sampled.append(token)
            if not finished:
                continue
            result = self._result(slot, report.states[row].tolist())
            if not result.is_acceptable:
                slot.best = result = max(filter(None, (slot.best, result)), key=quality)
                if slot.attempt + 1 < len(slot.task.options.temperatures):
                    slot.attempt += 1
                    slot.sampled = []
                    self._begin([slot])
                    continue
            done.append((slot.task.window_id, result))
            self._release(slot)
        return done

    def _result(self, slot: _Slot, state: list[int]) -> DecodedWindow:
        floats = cast(list[float], torch.tensor(state, dtype=torch.int32).view(torch.float32).tolist())
        tokens = slot.sampled[:-1] if slot.sampled[-1] == self.tokens.vocabulary.end else slot.sampled
        return DecodedWindow(
            tokens=tokens,
            text=self.tokens.text(tokens).strip(),
            language=self._languages[state[Field.START + 1]] if self.tokens.multilingual else "en",
            temperature=slot.temperature,
            avg_logprob=floats[Field.SUM_LOGPROB] / (len(tokens) + 1),
            no_speech_prob=floats[Field.NO_SPEECH],
        )

    def _release(self, slot: _Slot) -> None:
        """Fills the freed slot with the last one, so that occupied slots stay dense."""
        slot.released = True
        last = self._slots.pop()
        if last is not slot:
            # steps that were started but not yet read have gone on
            length = min(last.position + 1 + len(self._reports), self.decoder.dims.n_text_ctx)
            self.decoder.move(last.row, slot.row, length)
            self.states[slot.row].copy_(self.states[last.row])
            self._slots[slot.row] = last
            freed, last.row, last.is_ready = last.row, slot.row, False
        else:
            freed = slot.row
        self.states[freed, Field.FINISHED] = 1
