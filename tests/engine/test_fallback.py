from __future__ import annotations

import pytest

from serve_app.engine.fallback import DecodedWindow, compression_ratio, is_sparse, quality

PLAIN = "The quick brown fox jumps over the lazy dog and runs away."


def window(text: str = PLAIN, avg_logprob: float = -0.3, no_speech_prob: float = 0.0) -> DecodedWindow:
    return DecodedWindow([], text, "en", 0.0, avg_logprob, no_speech_prob)


def test_plain_text_is_acceptable() -> None:
    assert window().is_acceptable


def test_repetition_is_not() -> None:
    assert not window("he said, " * 40).is_acceptable


def test_doubt_is_not() -> None:
    assert not window(avg_logprob=-1.2).is_acceptable


def test_doubtful_text_where_nobody_speaks_is_silence_and_not_tried_again() -> None:
    silent = window(avg_logprob=-1.2, no_speech_prob=0.9)
    assert silent.is_silence
    assert silent.is_acceptable


def test_sure_text_is_no_silence_whatever_the_no_speech_probability() -> None:
    assert not window(avg_logprob=-0.3, no_speech_prob=0.9).is_silence


def test_of_failed_attempts_doubt_is_better_than_repetition() -> None:
    loop, doubtful, worse = window("he said, " * 40, -0.1), window(avg_logprob=-1.1), window(avg_logprob=-2.0)
    assert max([loop, worse, doubtful], key=quality) is doubtful


@pytest.mark.parametrize(("text", "low", "high"), [("", 0, 0), (PLAIN, 0.8, 1.2), ("ha" * 500, 20, 200)])
def test_compression_ratio(text: str, low: float, high: float) -> None:
    assert low <= compression_ratio(text) <= high


@pytest.mark.parametrize(
    ("tokens", "speech_seconds", "sparse"), [(5, 25.0, True), (80, 25.0, False), (2, 3.0, False), (0, 25.0, True)]
)
def test_little_text_for_much_speech_is_sparse(tokens: int, speech_seconds: float, sparse: bool) -> None:
    assert is_sparse(tokens, speech_seconds) is sparse
