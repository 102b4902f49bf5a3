"""Is a decoded window good enough, or is it decoded again at a higher temperature? (pure)

Thresholds and rules are openai-whisper's (``transcribe.py``).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

MAX_COMPRESSION_RATIO = 2.4  # text that compresses better repeats itself
MIN_AVG_LOGPROB = -1.0
MAX_NO_SPEECH_PROB = 0.6
SPARSE_SPEECH_S = 6.0
SPARSE_TOKENS_PER_SECOND = 1.0


@dataclass(frozen=True, slots=True)
class DecodedWindow:
    """One window's decoded tokens (timestamps included, without the start sequence and the end) and how sure the
    model was: mean log-probability a token, and the probability of <|nospeech|>."""

    tokens: list[int]
    text: str
    language: str
    temperature: float
    avg_logprob: float
    no_speech_prob: float

    @property
    def compression_ratio(self) -> float:
        return compression_ratio(self.text)

    @property
    def is_silence(self) -> bool:
        """The model says that nobody speaks, and is unsure of what it wrote."""
        return self.no_speech_prob > MAX_NO_SPEECH_PROB and self.avg_logprob < MIN_AVG_LOGPROB

    @property
    def is_acceptable(self) -> bool:
        if self.is_silence:
            return True
        return self.compression_ratio <= MAX_COMPRESSION_RATIO and self.avg_logprob >= MIN_AVG_LOGPROB


def is_sparse(tokens: int, speech_seconds: float) -> bool:
    """So little text for so much speech that the model must have passed over most of it, as it does now and then when
    it closes a window with one timestamp after a few words. Speech has three to six tokens a second."""
    return speech_seconds >= SPARSE_SPEECH_S and tokens < SPARSE_TOKENS_PER_SECOND * speech_seconds


def quality(window: DecodedWindow) -> tuple[bool, float]:
    """Orders results that failed the checks: repetition is worse than doubt.

    openai-whisper takes the last of them, which is the one sampled most freely, and so often the most invented.
    """
    return window.compression_ratio <= MAX_COMPRESSION_RATIO, window.avg_logprob


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; 0 for no text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
