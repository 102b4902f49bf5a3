"""How often a system is right, and by how much it is wrong (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from loadtest.dataset import Recording
from loadtest.gpu.fidelity.reference import Right, Window
from loadtest.scoring import Pair, Score, score
from serve_app.engine.tokens import Tokens

GOAL_FORCED = 0.998
GOAL_FREE = 0.97
GOAL_WER = 0.3
"""Points of word error rate more than openai-whisper's FP32."""


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

    def is_no_worse_than(self, other: System) -> bool:
        return self.forced >= other.forced and self.free >= other.free


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


def error_rate(recordings: Sequence[Recording], texts: Mapping[str, Sequence[str]]) -> Score:
    """Over all words of the recordings that have a reference. texts: of each file's windows, in order."""
    scored = (r for r in recordings if r.scored)
    return score(Pair(r.text, " ".join(texts[r.file]), r.language or "en") for r in scored)
