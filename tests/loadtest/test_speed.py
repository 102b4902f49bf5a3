from __future__ import annotations

import os
from pathlib import Path

import pytest

from loadtest import dataset, speed
from loadtest.speed import Timing


def test_the_list_is_sixteen_minutes_of_short_and_long_recordings(shared_audio: Path) -> None:
    recordings = speed.files(dataset.load(shared_audio))
    assert len(recordings) == 90
    assert sum(recording.seconds for recording in recordings) / 60 == pytest.approx(16.4, abs=0.1)
    assert all(recording.language == "en" and recording.scored for recording in recordings)


def test_the_short_list_is_part_of_the_list(shared_audio: Path) -> None:
    recordings = dataset.load(shared_audio)
    short = speed.files(recordings, short=True)
    assert set(short) < set(speed.files(recordings))
    assert sum(recording.seconds for recording in short) / 60 == pytest.approx(4, abs=0.5)


def test_a_ratio_is_taken_within_its_round() -> None:
    timings = [
        Timing("openai-whisper", 30.0, 0, []),
        Timing("whisper-serve", 20.0, 0, []),
        Timing("openai-whisper", 40.0, 0, []),
        Timing("whisper-serve", 20.0, 0, []),
    ]
    assert speed.ratios(timings, "whisper-serve", "openai-whisper") == [1.5, 2.0]


def test_more_cores_than_there_are_cannot_be_had() -> None:
    there = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match=f"there are {len(there)} cores"):
        speed.confine(len(there) + 1)
    assert os.sched_getaffinity(0) == there
