"""Tokens on real weights and speech: the engine and openai-whisper in FP16, each beside openai-whisper in FP32::

    python -m loadtest.gpu.fidelity --model embedded:base --json fidelity.json

Windows, languages and prompts are those of ``loadtest.identity``; openai-whisper's FP32 greedy tokens, made in the same
run on the same GPU without TF32, are what is right. Two questions are asked of a system. Forced: given the right tokens
so far, is the next one it would choose, under the rules, the right one? Free: does it write the whole window the same?
openai-whisper's FP16 runs window by window, so that its free run is its forced run up to its first mistake: it is right
free where it is right forced. The engine's windows share slots, so it runs both.

A mistake comes with the margin by which FP32 preferred its token: the difference of the two logits; where one is text
and the other a timestamp, of the timestamps' joint likelihood and the likeliest text, which is what the rules compare.

With ``--device cpu`` all of it runs in FP32, to try it out: openai-whisper beside itself then has no mistake.

Ends with status 1 where the engine misses a goal, 2 without recordings.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from whisper import log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import ModelDimensions, Whisper

from kernels.next_token import Field, idle_states, new_state
from loadtest import dataset, report
from loadtest.dataset import Recording
from loadtest.identity import CATEGORIES, Samples, read_windows
from serve_app.engine.checkpoint import Checkpoint, load
from serve_app.engine.encoder import Encoder
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens

GOAL_FORCED = 0.998
GOAL_FREE = 0.97
SLOTS = 32
LISTED = 20  # mistakes shown on the screen; the JSON has all


@dataclass(frozen=True, slots=True)
class Window:
    """A window, and how it is decoded."""

    name: str
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


@dataclass(frozen=True, slots=True)
class Mistake:
    """margin: None where the rules forbade the token in FP32."""

    window: str
    position: int
    right: str
    chosen: str
    margin: float | None


@dataclass(slots=True)
class System:
    """One system's count. free: of windows that it writes as they should be."""

    name: str
    positions: int = 0
    forced: int = 0
    windows: int = 0
    free: int = 0
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def forced_share(self) -> float:
        return self.forced / self.positions

    @property
    def free_share(self) -> float:
        return self.free / self.windows

    @property
    def margins(self) -> list[float]:
        return [mistake.margin for mistake in self.mistakes if mistake.margin is not None]

    @property
    def reached(self) -> bool:
        return self.forced_share >= GOAL_FORCED and self.free_share >= GOAL_FREE


# ---- openai-whisper ----


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


# ---- the engine ----


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

    def __init__(self, checkpoint: Checkpoint, compute: Compute, slots: int = SLOTS):
        self.compute, self.tokens = compute, Tokens(checkpoint.dims)
        self._log_mel, self._encoder = LogMel(checkpoint.dims.n_mels, compute), Encoder(checkpoint, compute)
        self._slots = SlotDecoder(checkpoint, compute, slots)

    def encode(self, windows: Sequence[Window]) -> Tensor:
        return self._encoder(self._log_mel([window.samples for window in windows]))

    def free(self, windows: Sequence[Window], states: Tensor) -> list[list[int]]:
        """The tokens of each window, without the end."""
        self._slots.admit(
            [
                SlotTask(window.name, state, DecodeOptions(language=window.language, prompt=window.prompt))
                for window, state in zip(windows, states, strict=True)
            ]
        )
        done: dict[str, DecodedWindow] = {}
        while self._slots.active:
            done.update(self._slots.step())
        return [done[window.name].tokens for window in windows]

    @torch.inference_mode()
    def forced(self, windows: Sequence[Window], states: Tensor, right: Sequence[Sequence[int]]) -> list[list[int]]:
        """What it would choose after each beginning of the right tokens, in the steps that decoding takes."""
        n, decoder, begins, tables = len(windows), self._slots.decoder, [], []
        timestamp_begin = self.tokens.vocabulary.timestamp_begin
        for row, (window, state, tokens) in enumerate(zip(windows, states, right, strict=True)):
            prompt = self.tokens.prompt(window.prompt)
            decoder.load(row, state)
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


# ---- the comparison ----


def margin(logits: Tensor, best_text: float, right: int, chosen: int, timestamp_begin: int) -> float | None:
    """By how much FP32 preferred ``right`` to ``chosen`` (pure). logits, best_text: of ``Right``, at one step."""
    if (right >= timestamp_begin) == (chosen >= timestamp_begin):
        difference = float(logits[right] - logits[chosen])
    else:
        difference = abs(float(logits[timestamp_begin:].logsumexp(dim=0)) - best_text)
    return difference if math.isfinite(difference) else None


def count(system: System, window: Window, right: Right, forced: Sequence[int], free: bool, tokens: Tokens) -> None:
    """Adds a window to a system's count."""
    system.windows += 1
    system.free += free
    system.positions += len(right.chosen)
    for position, (should, chosen) in enumerate(zip(right.chosen, forced, strict=True)):
        if chosen == should:
            system.forced += 1
            continue
        by = margin(
            right.logits[position],
            float(right.best_text[position]),
            should,
            chosen,
            tokens.vocabulary.timestamp_begin,
        )
        system.mistakes.append(Mistake(window.name, position, shown(should, tokens), shown(chosen, tokens), by))


def shown(token: int, tokens: Tokens) -> str:
    vocabulary = tokens.vocabulary
    if token >= vocabulary.timestamp_begin:
        return f"<|{(token - vocabulary.timestamp_begin) * 0.02:.2f}|>"
    return "<|endoftext|>" if token == vocabulary.end else tokens.text([token])


@torch.no_grad()
def reference(
    model: Reference, recordings: Sequence[Recording], cut: Sequence[Sequence[Samples]], device: torch.device
) -> Iterator[tuple[Window, Right]]:
    """Every window with what is right: the text of the window before, in FP32, is its prompt."""
    for recording, windows in zip(recordings, cut, strict=True):
        prompt = None
        for index, samples in enumerate(windows):
            window = Window(f"{recording.file}#{index}", samples, recording.language or "en", prompt)
            with exactly(device):
                right = model.right(window)
            yield window, right
            prompt = right.text


@torch.no_grad()
def compare(
    checkpoint: Checkpoint,
    recordings: Sequence[Recording],
    cut: Sequence[Sequence[Samples]],
    device: torch.device,
    slots: int = SLOTS,
) -> list[System]:
    """The engine and openai-whisper's FP16 (on the CPU: both FP32), beside openai-whisper's FP32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    fp16 = device.type == "cuda"
    precision = "FP16" if fp16 else "FP32"
    model = Reference(checkpoint, device)
    engine = Engine(checkpoint, Compute.resolve(device.type, "float16" if fp16 else "float32"), slots)
    ours, theirs = System(f"whisper-serve, {precision}"), System(f"openai-whisper, {precision}")
    total = sum(map(len, cut))
    windows = track(reference(model, recordings, cut, device), "windows", total=total, console=Console(stderr=True))
    for group in _groups(windows, slots):
        together = [window for window, _ in group]
        states = engine.encode(together)
        forced = engine.forced(together, states, [right.chosen for _, right in group])
        free = engine.free(together, states)
        for (window, right), ours_forced, ours_free in zip(group, forced, free, strict=True):
            end = engine.tokens.vocabulary.end
            whole = right.chosen[:-1] if right.chosen[-1] == end else right.chosen
            count(ours, window, right, ours_forced, ours_free == whole, engine.tokens)
            theirs_forced = model.forced(window, right.chosen, fp16=fp16)
            count(theirs, window, right, theirs_forced, theirs_forced == right.chosen, engine.tokens)
    return [ours, theirs]


def _groups(windows: Iterable[tuple[Window, Right]], size: int) -> Iterator[list[tuple[Window, Right]]]:
    group: list[tuple[Window, Right]] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _print(console: Console, name: str, systems: Sequence[System]) -> None:
    table = Table(title=f"{name}: beside openai-whisper's greedy tokens in FP32")
    for column in ("system", "tokens", "right, forced", "%", "windows", "right, free", "%", "margin of mistakes"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in systems:
        margins = system.margins
        spread = f"median {statistics.median(margins):.3f}, most {max(margins):.3f}" if margins else "–"
        table.add_row(
            system.name,
            str(system.positions),
            str(system.forced),
            f"{100 * system.forced_share:.3f}",
            str(system.windows),
            str(system.free),
            f"{100 * system.free_share:.2f}",
            spread,
        )
    console.print(table)
    for system in systems:
        for mistake in system.mistakes[:LISTED]:
            by = "forbidden in FP32" if mistake.margin is None else f"margin {mistake.margin:.4f}"
            line = f"{mistake.window} at {mistake.position}: {mistake.chosen!r} for {mistake.right!r}, {by}"
            console.print(f"{system.name}: {line}", highlight=False, markup=False)
    ours = systems[0]
    console.print(
        f"goals: forced at least {100 * GOAL_FORCED:g} %, free at least {100 * GOAL_FREE:g} %: "
        f"{'reached' if ours.reached else 'missed'}",
        highlight=False,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dataset.add_argument(parser)
    parser.add_argument("--model", default="embedded:base", help="checkpoint (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--slots", type=int, default=SLOTS, help="windows that the engine decodes together (%(default)s)"
    )
    parser.add_argument("--files", type=int, help="only so many recordings, spread over the set")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    recordings, _ = dataset.load_or_exit(options.audio)
    checkpoint = load(options.model)
    chosen = [r for r in dataset.select(recordings, *CATEGORIES) if checkpoint.dims.multilingual or r.language == "en"]
    if options.files is not None:
        chosen = chosen[:: max(1, len(chosen) // options.files)][: options.files]
    cut = asyncio.run(read_windows(chosen))
    began = time.monotonic()
    systems = compare(checkpoint, chosen, cut, torch.device(options.device), options.slots)
    _print(report.console(), checkpoint.name, systems)
    if options.json is not None:
        rows = [
            asdict(system) | {"forced_share": system.forced_share, "free_share": system.free_share}
            for system in systems
        ]
        payload = {
            "environment": report.environment(options.commit),
            "model": checkpoint.name,
            "device": options.device,
            "slots": options.slots,
            "seconds": time.monotonic() - began,
            "systems": rows,
        }
        report.write_json(options.json, payload)
    return 0 if systems[0].reached else 1


if __name__ == "__main__":
    sys.exit(main())
