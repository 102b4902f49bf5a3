"""In-flight batching: windows enter free slots between steps and leave when they end, whatever the others do.

This is the host's side of decoding. It is driven by one thread: ``admit``, ``step``, ``cancel``. The device keeps what
a step needs of each slot (``kernels.next_token.Field``), so that on a GPU the host starts steps before it has seen the
last ones' tokens: it looks some behind, and the GPU need not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from serve_app.engine.states import Bits
from serve_app.engine.tokens import Tokens

LAUNCHED_LAYERS = 16
"""Of the decoder, in what is launched on a GPU at once: of small models several steps. A step of theirs takes less than
the host does for a launch and a look, where that must wait for the interpreter."""


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
    """The slots' states after each step of a launch, [steps, slots, fields], once they have arrived on the host, and
    whose they are: slots in their rows then, and their attempts."""

    slots: list[tuple[int, _Slot, int]]
    states: np.ndarray[Any, Any]
    arrived: torch.cuda.Event | None


class SlotDecoder:
    """Decodes up to ``slots`` windows at once. A step works on the rows up to the last occupied one. A row that comes
    free is the next window's; where none comes, and a smaller step would do, the last rows move down."""

    @torch.inference_mode()
    def __init__(
        self,
        checkpoint: Checkpoint,
        compute: Compute,
        slots: int,
        rules: Rules | None = None,
        *,
        state_bits: Bits = 16,
        steps: int | None = None,
    ):
        """rules: of choosing tokens, where they are not to be Whisper's own. state_bits: as the decoder's. steps: that
        are launched at once; by default one, on a GPU more for a decoder of few layers."""
        self.decoder = Decoder(checkpoint, compute, slots, state_bits)
        self.tokens = Tokens(checkpoint.dims)
        vocabulary = self.tokens.vocabulary
        self._choose = NextToken(rules or rules_of(vocabulary, checkpoint.dims), compute.device, slots)
        self.states = idle_states(slots, compute.device)
        self._languages = {token: code for code, token in vocabulary.languages.items()}
        self._rows: list[_Slot | None] = [None] * slots
        self._slots: list[_Slot] = []  # the same, in the order in which they entered
        self._again: list[_Slot] = []  # windows that start again with the next step
        self._reports: deque[_Report] = deque()
        self._on_gpu = compute.device.type == "cuda"
        default = LAUNCHED_LAYERS // checkpoint.dims.n_text_layer if compute.has_kernels else 1
        self.steps = steps or max(1, default)
        self.started = 0  # steps so far
        self._history = self.states.repeat(self.steps, 1, 1)  # the states after each step of a launch
        self._sizes = buckets(slots) if compute.has_kernels else list(range(1, slots + 1))  # of steps
        self.advance = SizedGraphs(self._advance, self._sizes) if compute.has_kernels else self._advance
        few = [n for n in persistent_step.SLOTS if n <= self.decoder.few]
        self.advance_few = SizedGraphs(self._advance_few, few) if few else None
        # launches that are not waited for: on a GPU one step runs and the next waits while the one before them is read;
        # of several steps in a launch, one launch runs
        self.lag = 2 if self._on_gpu else 0
        self._arrivals = deque(self._arrival() for _ in range(self.lag + 1)) if self._on_gpu else deque()

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
        rows = [row for row, slot in enumerate(self._rows) if slot is None]
        self.decoder.load(rows[: len(tasks)], [task.state for task in tasks])
        entered = []
        for row, task in zip(rows, tasks, strict=False):
            prompt = self.tokens.prompt(task.options.prompt)
            slot = _Slot(task, row, prompt, position=len(prompt))
            if slot.prompt:
                self.decoder.prefill(row, slot.prompt)
            entered.append(slot)
        for slot in entered:
            self._rows[slot.row] = slot
        self._slots += entered
        self._begin(entered)

    @torch.inference_mode()
    def cancel(self, window_ids: Collection[str]) -> None:
        """Frees the slots of these windows; unknown ids are ignored (they have just ended)."""
        for slot in [slot for slot in self._slots if slot.task.window_id in window_ids]:
            self._release(slot)
            self.states[slot.row, Field.FINISHED] = 1

    @torch.inference_mode()
    def step(self, coming: int = 0) -> list[tuple[str, DecodedWindow]]:
        """Advances every occupied slot by one token, or as many as steps are launched at once; returns what has
        ended. coming: windows that will be admitted next, for which free rows stay where they are."""
        if not self._slots:
            return self._read_all_but(self.lag)
        steps = self._start_steps(coming)
        self.started += steps
        self._reports.append(self._report(steps))
        return self._read_all_but(self.lag if steps == 1 else min(self.lag, 1))

    def wait(self) -> None:
        """Waits until the device has done all that was started."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def read(self) -> list[tuple[str, DecodedWindow]]:
        """Reads all steps that were started; returns what has ended. It starts nothing on the device."""
        return self._read_all_but(0)

    def _start_steps(self, coming: int) -> int:
        """Launches steps; so many."""
        self._begin([slot for slot in self._again if not slot.released])
        self._again = []
        n = self._close_gaps(coming)
        if self.advance_few is None or n > self.decoder.few:
            self.advance(n)
            return self.steps
        for slot in self._slots:
            if not slot.is_ready:
                self.decoder.ready(slot.row)
                slot.is_ready = True
        self.advance_few(n)
        return 1

    def _close_gaps(self, coming: int) -> int:
        """Moves the last rows into free ones where a step of a smaller size then does, and will with the windows that
        come; so many rows are left."""
        end = 1 + max(slot.row for slot in self._slots)
        needed = self._size(min(len(self._slots) + coming, self.decoder.slots))
        if needed >= self._size(end):
            return end
        free = (row for row in range(needed) if self._rows[row] is None)
        for slot in [slot for slot in self._rows[needed:end] if slot is not None]:
            self._move(slot, next(free))
        return 1 + max(slot.row for slot in self._slots)

    def _size(self, rows: int) -> int:
        """Of the step that works on so many."""
        return next(size for size in self._sizes if size >= rows)

    def _move(self, slot: _Slot, row: int) -> None:
        # steps that were started but not yet read have gone on
        ahead = sum(len(report.states) for report in self._reports)
        length = min(slot.position + 1 + ahead, self.decoder.dims.n_text_ctx)
        self.decoder.move(slot.row, row, length)
        self.states[row].copy_(self.states[slot.row])
        self.states[slot.row, Field.FINISHED] = 1
        self._rows[slot.row], self._rows[row] = None, slot
        slot.row, slot.is_ready = row, False

    def _advance(self, n: int) -> None:
        """Steps of the first n slots, on the device."""
        states = self.states[:n]
        for after in self._history:
            self._choose(self.decoder.step(states[:, Field.TOKEN], states[:, Field.POSITION]), states)
            after.copy_(self.states)

    def _advance_few(self, n: int) -> None:
        """One step of the first n slots, on the device."""
        states = self.states[:n]
        self._choose(self.decoder.step_few(states[:, Field.TOKEN], states[:, Field.POSITION]), states)
        self._history[0].copy_(self.states)

    def _begin(self, slots: Sequence[_Slot]) -> None:
        """Writes the first states of slots. Their prompts are in the caches already."""
        if not slots:
            return
        states = torch.tensor([self._first_state(slot) for slot in slots], dtype=torch.int32)
        rows = torch.tensor([slot.row for slot in slots])
        if self._on_gpu:
            device = self.states.device
            states, rows = (t.pin_memory().to(device, non_blocking=True) for t in (states, rows))
        self.states.index_copy_(0, rows, states)

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

    def _arrival(self) -> tuple[Tensor, np.ndarray[Any, Any], torch.cuda.Event]:
        """Where the states of a launch arrive on the host, as a tensor and as an array, and the event that tells."""
        host = torch.empty(self._history.shape, dtype=self._history.dtype, pin_memory=True)
        return host, host.numpy(), torch.cuda.Event(blocking=True)  # who waits for it sleeps

    def _report(self, steps: int) -> _Report:
        slots = [(slot.row, slot, slot.attempt) for slot in self._slots]
        if not self._on_gpu:
            return _Report(slots, self._history[:steps].numpy().copy(), None)
        host, array, arrived = self._arrivals[0]
        self._arrivals.rotate(-1)
        host[:steps].copy_(self._history[:steps], non_blocking=True)
        arrived.record()
        return _Report(slots, array[:steps], arrived)

    def _read_all_but(self, lag: int) -> list[tuple[str, DecodedWindow]]:
        done: list[tuple[str, DecodedWindow]] = []
        while len(self._reports) > lag:
            done += self._read(self._reports.popleft())
        return done

    def _read(self, report: _Report) -> list[tuple[str, DecodedWindow]]:
        """Takes a launch's tokens in, and finished windows out of their slots; those that fail the checks start again,
        hotter."""
        if report.arrived is not None:
            report.arrived.synchronize()
        return [ended for states in report.states for ended in self._read_step(report.slots, states)]

    def _read_step(
        self, slots: Sequence[tuple[int, _Slot, int]], states: np.ndarray[Any, Any]
    ) -> list[tuple[str, DecodedWindow]]:
        done = []
        fields = Field.POSITION, Field.SAMPLED, Field.TOKEN, Field.FINISHED
        states = states[[row for row, _, _ in slots]]
        columns = states[:, fields].T.tolist()
        for (_, slot, attempt), state, position, sampled, token, finished in zip(slots, states, *columns, strict=True):
            if slot.released or slot.attempt != attempt:
                continue
            slot.position = position
            if sampled > len(slot.sampled):
                slot.sampled.append(token)
            if not finished:
                continue
            result = self._result(slot, state)
            if not result.is_acceptable:
                slot.best = result = max(filter(None, (slot.best, result)), key=quality)
                if slot.attempt + 1 < len(slot.task.options.temperatures):
                    slot.attempt += 1
                    slot.sampled = []
                    self._again.append(slot)
                    continue
            done.append((slot.task.window_id, result))
            self._release(slot)
        return done

    def _result(self, slot: _Slot, state: np.ndarray[Any, Any]) -> DecodedWindow:
        floats = state.view(np.float32).tolist()
        tokens = slot.sampled[:-1] if slot.sampled[-1] == self.tokens.vocabulary.end else slot.sampled
        return DecodedWindow(
            tokens=tokens,
            text=self.tokens.text(tokens).strip(),
            language=self._languages[int(state[Field.START + 1])] if self.tokens.multilingual else "en",
            temperature=slot.temperature,
            avg_logprob=floats[Field.SUM_LOGPROB] / (len(tokens) + 1),
            no_speech_prob=floats[Field.NO_SPEECH],
        )

    def _release(self, slot: _Slot) -> None:
        """Frees a slot; on the device a window that has ended stands still by itself."""
        slot.released = True
        self._slots.remove(slot)
        self._rows[slot.row] = None
