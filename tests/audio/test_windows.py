from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.audio.windows import Window, WindowCutter
from serve_app.settings import VadSettings

FRAME = 512
MAX_WINDOW = 480_000
DEFAULT = VadSettings()


@dataclass
class Recording:
    """Probabilities of speech, and samples of which each tells its place."""

    probabilities: npt.NDArray[np.float32]
    length: int

    @cached_property
    def samples(self) -> npt.NDArray[np.int16]:
        return (np.arange(self.length) % 32_749).astype(np.int16)


def recording(*parts: tuple[float, float], cut: int = 0) -> Recording:
    """Parts of (seconds, probability of speech); ``cut`` samples of the last frame are missing."""
    probabilities = np.concatenate([np.full(round(seconds * 31.25), p, np.float32) for seconds, p in parts])
    return Recording(probabilities, len(probabilities) * FRAME - cut)


def cut(recording: Recording, settings: VadSettings = DEFAULT, portion: int | None = None) -> list[Window]:
    cutter = WindowCutter(settings)
    portion = portion or recording.length
    windows, judged = [], 0
    for start in range(0, recording.length, portion):
        taken = min(start + portion, recording.length)
        windows += cutter.push(recording.samples[start:taken], recording.probabilities[judged : taken // FRAME])
        judged = taken // FRAME
    windows += cutter.finish(recording.probabilities[judged:])
    assert cutter.duration == recording.length / 16_000
    return windows


def bounds(windows: list[Window]) -> list[tuple[float, float]]:
    return [(round(w.start, 2), round(w.start + len(w.samples) / 16_000, 2)) for w in windows]


def speech_frames(probabilities: npt.NDArray[np.float32], settings: VadSettings) -> npt.NDArray[np.bool_]:
    """Which frames are speech, found over the whole recording: stretches begin at the threshold, go on down to 0.15
    under it and over pauses shorter than ``min_silence_s``, and count from ``min_speech_s``."""
    frames = np.zeros(len(probabilities), bool)
    low = max(settings.threshold - 0.15, min(settings.threshold, 0.01))
    shortest, pause = (max(1, int(np.ceil(s * 31.25))) for s in (settings.min_speech_s, settings.min_silence_s))
    at = 0
    while at < len(probabilities):
        if probabilities[at] < settings.threshold:
            at += 1
            continue
        begin = end = at
        while at < len(probabilities) and at - end < pause:
            if probabilities[at] >= low:
                end = at + 1
            at += 1
        if end - begin >= shortest:
            frames[begin:end] = True
    return frames


def spoken(window: Window) -> npt.NDArray[np.bool_]:
    """Which of the window's frames it says are speech."""
    frames = np.zeros(-(-len(window.samples) // FRAME), bool)
    for begin, end in window.speech:
        frames[round(begin * 31.25) : round(end * 31.25)] = True
    return frames


def test_a_recording_of_up_to_30_s_is_one_whole_window() -> None:
    whole = recording((4, 0.0), (1, 0.9), (10, 0.0), (2, 0.9), (12.9, 0.0), cut=7)
    [window] = cut(whole)
    assert window.start == 0
    assert np.array_equal(window.samples, whole.samples)
    assert [time for span in window.speech for time in span] == pytest.approx([4, 5, 15, 17], abs=0.04)
    assert window.speech_seconds == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("length", "count"), [(MAX_WINDOW - 1, 1), (MAX_WINDOW, 1), (MAX_WINDOW + 1, 2)])
def test_30_s_to_the_sample(length: int, count: int) -> None:
    windows = cut(Recording(np.full(-(-length // FRAME), 0.9, np.float32), length))
    assert len(windows) == count
    assert sum(len(window.samples) for window in windows) == length


@pytest.mark.parametrize("seconds", [0.02, 5, 60])
def test_without_speech_there_is_no_window(seconds: float) -> None:
    assert cut(recording((seconds, 0.1))) == []


def test_an_empty_recording_has_no_window() -> None:
    assert WindowCutter(DEFAULT).finish(np.zeros(0, np.float32)) == []


def test_a_click_is_not_speech() -> None:
    assert cut(recording((5, 0.0), (0.2, 0.9), (5, 0.0))) == []
    assert cut(recording((40, 0.0), (0.2, 0.9), (40, 0.0))) == []
    assert len(cut(recording((5, 0.0), (0.2, 0.9), (5, 0.0)), VadSettings(min_speech_s=0.1))) == 1


def test_a_long_pause_ends_a_window_and_is_not_decoded() -> None:
    windows = cut(recording((5, 0.0), (10, 0.9), (40, 0.0), (3, 0.9), (35, 0.0)))
    assert bounds(windows) == [pytest.approx((4.6, 15.4), abs=0.1), pytest.approx((54.6, 58.4), abs=0.1)]


def test_a_short_pause_does_not_end_a_window() -> None:
    assert len(cut(recording((10, 0.9), (1.9, 0.0), (10, 0.9), (1.9, 0.0), (5, 0.9), (20, 0.0)))) == 1


def test_a_run_of_speech_is_cut_in_the_middle_of_its_latest_good_pause() -> None:
    windows = cut(recording((17, 0.9), (0.6, 0.0), (10.4, 0.9), (0.6, 0.0), (25, 0.9)))
    assert bounds(windows)[0] == pytest.approx((0, 28.3), abs=0.05)
    assert windows[1].start == pytest.approx(28.3, abs=0.05)


def test_a_real_pause_is_better_than_a_later_short_one() -> None:
    windows = cut(recording((24, 0.9), (0.6, 0.0), (4, 0.9), (0.13, 0.0), (25, 0.9)))
    assert bounds(windows)[0][1] == pytest.approx(24.3, abs=0.05)


def test_at_a_cut_a_window_keeps_no_more_silence_than_the_padding() -> None:
    windows = cut(recording((26, 0.9), (1.8, 0.0), (25, 0.9)))
    assert bounds(windows)[0][1] == pytest.approx(26.4, abs=0.05)
    assert windows[1].start == pytest.approx(27.4, abs=0.05)


def test_speech_that_just_fits_is_not_cut() -> None:
    windows = cut(recording((1, 0.0), (20, 0.9), (0.5, 0.0), (9, 0.9), (40, 0.0)))
    assert bounds(windows) == [pytest.approx((0.6, 30.55), abs=0.05)]


def test_without_a_pause_it_is_cut_at_the_least_likely_speech() -> None:
    windows = cut(recording((25, 0.9), (0.032, 0.5), (25, 0.9)))
    assert bounds(windows)[0] == pytest.approx((0, 25), abs=0.04)
    assert windows[1].start == pytest.approx(25, abs=0.04)


def test_windows_are_given_before_the_recording_ends() -> None:
    long = recording(*[(8, 0.9), (0.5, 0.0)] * 20)
    cutter = WindowCutter(DEFAULT)
    windows = cutter.push(long.samples[: 32 * 16_000], long.probabilities[:1000])
    assert len(windows) == 1


def a_window(*speech: tuple[float, float]) -> Window:
    return Window(3, 100.0, np.arange(20 * 16_000).astype(np.int16), speech)


def test_what_a_transcript_left_of_a_window_is_a_window() -> None:
    window = a_window((1, 6), (8, 12), (14, 19))
    rest = window.after(10.0)
    assert rest is not None
    assert (rest.index, rest.start) == (3, 110.0)
    assert np.array_equal(rest.samples, window.samples[160_000:])
    assert rest.speech == ((0.0, 2.0), (4.0, 9.0))


@pytest.mark.parametrize("timestamp", [7.1, 7.9, 8.4])
def test_a_timestamp_near_a_pause_means_the_end_of_that_pause(timestamp: float) -> None:
    rest = a_window((1, 6), (8, 12)).after(timestamp)
    assert rest is not None
    assert rest.start == pytest.approx(107.9)
    assert rest.speech[0] == pytest.approx((0.1, 4.1))


@pytest.mark.parametrize("timestamp", [11.3, 12.0, 20.0, 25.0])
def test_next_to_no_speech_is_no_window(timestamp: float) -> None:
    assert a_window((1, 6), (8, 12)).after(timestamp) is None


def test_nothing_was_transcribed_is_no_rest_but_the_same_window() -> None:
    assert a_window((0, 6), (8, 12)).after(0.0) is None


def test_probabilities_must_match_the_samples() -> None:
    cutter = WindowCutter(DEFAULT)
    cutter.push(np.zeros(5120, np.int16), np.zeros(9, np.float32))
    with pytest.raises(ValueError, match="9 probabilities for 5120 samples"):
        cutter.finish(np.zeros(0, np.float32))


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Speech, pauses, clicks and doubtful stretches of all lengths."""
    seed = draw(st.integers(0, 2**32 - 1))
    length = st.one_of(st.integers(1, 12), st.integers(1, 100), st.integers(1, 1500))
    parts = draw(st.lists(st.tuples(length, st.sampled_from([0.05, 0.4, 0.5, 0.95])), min_size=1, max_size=25))
    jitter = draw(st.sampled_from([0.0, 0.04, 0.3]))
    probabilities = np.concatenate([np.full(frames, p) for frames, p in parts])
    probabilities += np.random.default_rng(seed).uniform(-jitter, jitter, len(probabilities))
    cut = draw(st.integers(0, FRAME - 1))
    return Recording(np.clip(probabilities, 0, 1).astype(np.float32), len(probabilities) * FRAME - cut)


VAD = st.one_of(
    st.just(DEFAULT),
    st.builds(
        VadSettings,
        threshold=st.sampled_from([0.1, 0.5, 0.8]),
        min_speech_s=st.sampled_from([0.0, 0.25, 1.5]),
        min_silence_s=st.sampled_from([0.0, 0.1, 0.7]),
        pad_s=st.sampled_from([0.0, 0.4, 3.0]),
        max_pause_s=st.sampled_from([0.05, 0.5, 2.0, 20.0]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(recording=recordings(), vad=VAD)
def test_windows_hold_all_speech_once(recording: Recording, vad: VadSettings) -> None:
    windows = cut(recording, vad)
    speech = speech_frames(recording.probabilities, vad)
    covered = np.zeros(len(speech), int)
    end = 0
    for index, window in enumerate(windows):
        start = round(window.start * 16_000)
        assert window.index == index
        assert 0 < len(window.samples) <= MAX_WINDOW
        assert start >= end, "windows overlap"
        end = start + len(window.samples)
        assert np.array_equal(window.samples, recording.samples[start:end])
        frames = slice(start // FRAME, -(-end // FRAME))
        covered[frames] += 1
        assert np.array_equal(spoken(window), speech[frames])
        assert window.speech
    assert (covered[speech] == 1).all()
    if recording.length <= MAX_WINDOW:
        assert [len(window.samples) for window in windows] == [recording.length] * bool(speech.any())


@settings(max_examples=60, deadline=None)
@given(recording=recordings(), vad=VAD)
def test_speech_is_padded_and_long_pauses_are_left_out(recording: Recording, vad: VadSettings) -> None:
    if recording.length <= MAX_WINDOW:
        return
    speech = np.flatnonzero(speech_frames(recording.probabilities, vad))
    pad, max_pause = (int(np.ceil(s * 31.25)) for s in (vad.pad_s, vad.max_pause_s))
    spans = [
        (round(w.start * 31.25), -(-round(w.start * 16_000 + len(w.samples)) // FRAME)) for w in cut(recording, vad)
    ]
    for begin, end in spans:
        inside = speech[(speech >= begin) & (speech < end)]
        assert inside[0] - begin <= pad
        assert (np.diff(inside) - 1 <= max_pause).all()
    for (_, end), (begin, _) in itertools.pairwise(spans):
        before, after = speech[speech < end][-1], speech[speech >= begin][0]
        if after - before - 1 > max(2 * pad, max_pause):
            assert after - begin == pad, "nothing stands in the way of the padding"


@settings(max_examples=40, deadline=None)
@given(recording=recordings(), vad=VAD, portion=st.integers(1, 100_000))
def test_how_a_recording_is_portioned_changes_nothing(recording: Recording, vad: VadSettings, portion: int) -> None:
    portion = max(portion, recording.length // 200)
    whole, parts = cut(recording, vad), cut(recording, vad, portion)
    assert [(w.start, w.speech) for w in whole] == [(w.start, w.speech) for w in parts]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(whole, parts, strict=True))


@settings(max_examples=50, deadline=None)
@given(recording=recordings(), vad=VAD, portion=st.integers(8000, 100_000))
def test_what_is_held_is_bounded(recording: Recording, vad: VadSettings, portion: int) -> None:
    cutter = WindowCutter(vad)
    judged = 0
    for start in range(0, recording.length, portion):
        taken = min(start + portion, recording.length)
        cutter.push(recording.samples[start:taken], recording.probabilities[judged : taken // FRAME])
        judged = taken // FRAME
        assert sum(map(len, cutter._portions)) <= 31 * 16_000 + portion


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_reading_aloud_fills_its_windows(seed: int) -> None:
    """Sentences of 2 to 8 s with pauses of 0.2 to 0.8 s: windows are cut in pauses, and are long."""
    random = np.random.default_rng(seed)
    parts = [part for _ in range(60) for part in ((random.uniform(2, 8), 0.95), (random.uniform(0.2, 0.8), 0.02))]
    reading = recording(*parts)
    windows = cut(reading)
    for window in windows[:-1]:
        end = round((window.start + len(window.samples) / 16_000) * 31.25)
        assert min(reading.probabilities[end - 1 : end + 1]) < 0.1
    assert np.mean([len(window.samples) for window in windows[:-1]]) >= 24 * 16_000


def test_halves_are_cut_in_the_pause_nearest_to_the_middle_and_lose_nothing() -> None:
    samples = np.arange(20 * 16_000, dtype=np.int32).astype(np.int16)
    window = Window(3, 100.0, samples, ((0.0, 4.0), (5.0, 11.0), (12.0, 20.0)))
    left, right = window.halves()
    assert len(left.samples) / 16_000 == 11.5
    assert right.start == 111.5
    np.testing.assert_array_equal(np.concatenate([left.samples, right.samples]), samples)
    assert (left.speech, right.speech) == (((0.0, 4.0), (5.0, 11.0)), ((0.5, 8.5),))
    assert (left.index, right.index) == (3, 3)


def test_halves_of_speech_without_a_pause_are_equal() -> None:
    left, right = Window(0, 0.0, np.zeros(16_000, np.int16), ((0.0, 1.0),)).halves()
    assert len(left.samples) == len(right.samples)
