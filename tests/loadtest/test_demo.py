from __future__ import annotations

import pytest

from loadtest import demo

SPOKEN = (demo.ASSETS / "sample.txt").read_text()


def test_the_sample_is_short_mono_speech_at_16_khz() -> None:
    sample = demo.ASSETS / "sample.flac"
    assert demo.duration(sample) == pytest.approx(12.5, abs=0.1)
    assert sample.stat().st_size < 400_000


def test_a_right_transcript_has_all_words_right() -> None:
    right, words = demo.words_right(SPOKEN, SPOKEN.upper().replace(",", ""))
    assert right == words == 40


def test_a_transcript_of_something_else_has_few_words_right() -> None:
    right, words = demo.words_right(SPOKEN, "Thanks for watching! See you in the next video.")
    assert right < 0.2 * words


def test_a_transcript_in_another_order_is_not_right() -> None:
    right, words = demo.words_right(SPOKEN, " ".join(reversed(SPOKEN.split())))
    assert right < 0.5 * words
