"""Error rates of transcripts (pure).

Words are counted as the authors of Whisper count them: both sides through ``EnglishTextNormalizer`` (English) or
``BasicTextNormalizer`` (other languages), then errors over all words of a group. Chinese and Japanese are counted by
the character, and Chinese is brought to simplified script first, because Whisper writes either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import jiwer
import opencc
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

BY_CHARACTER = frozenset({"zh", "ja"})

# A decoder caught in a loop writes its last words again and again. Honest transcripts stay far below this, even those
# that write out what the reference abbreviates.
LOOP_RATIO = 1.5
LOOP_ALLOWANCE = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference, what was heard, and the language (Whisper's code) that both are in."""

    reference: str
    hypothesis: str
    language: str


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of a group of transcripts; ``words`` counts its references' words (characters in Chinese, Japanese)."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def percent(self) -> float:
        return 100 * self.errors / self.words


def score(pairs: Iterable[Pair]) -> Score:
    """Errors over all words of the pairs. Raises ValueError where a reference has no words, or there is no pair."""
    references, hypotheses = [], []
    for pair in pairs:
        reference = normalise(pair.reference, pair.language)
        if not reference:
            raise ValueError(f"a reference without words cannot be scored: {pair.reference!r}")
        references.append(reference)
        hypotheses.append(normalise(pair.hypothesis, pair.language))
    if not references:
        raise ValueError("nothing to score")
    result = jiwer.process_words(references, hypotheses)
    return Score(result.substitutions, result.deletions, result.insertions, sum(map(len, result.references)))


def loops(pair: Pair) -> bool:
    """Whether the transcript is so much longer than its reference that the decoder must have repeated itself."""
    reference, hypothesis = (len(normalise(t, pair.language).split()) for t in (pair.reference, pair.hypothesis))
    return hypothesis > LOOP_RATIO * reference + LOOP_ALLOWANCE


def normalise(text: str, language: str) -> str:
    """The text as it is compared: words (or characters) parted by single spaces."""
    if language == "zh":
        text = _to_simplified()(text)
    return " ".join(_normaliser(language)(text).split())


@cache
def _normaliser(language: str) -> Callable[[str], str]:
    normaliser: Callable[[str], str]
    if language == "en":
        normaliser = EnglishTextNormalizer()
    else:
        normaliser = BasicTextNormalizer(split_letters=language in BY_CHARACTER)
    return normaliser


@cache
def _to_simplified() -> Callable[[str], str]:
    return opencc.OpenCC("t2s").convert
