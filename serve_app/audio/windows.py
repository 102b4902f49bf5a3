"""Cuts a recording into the windows that Whisper takes (pure).

All times inside are in frames of voice activity, 32 ms, so that a window never splits one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from serve_app.audio.samples import FRAME_SAMPLES, SAMPLE_RATE, Float32, Int16
from serve_app.settings import VadSettings

WINDOW_SAMPLES = 30 * SAMPLE_RATE
WINDOW_FRAMES = WINDOW_SAMPLES // FRAME_SAMPLES

# Speech, once begun, goes on down to this much under the threshold, as in silero-vad's own segmentation.
HYSTERESIS = 0.15
# A window that must be cut is heard this much further first, to learn how long a pause at its end is, or whether the
# speech ends with it.
LOOKAHEAD_FRAMES = SAMPLE_RATE // FRAME_SAMPLES
# A window is cut in its second half: shorter windows cost the same (Whisper pads to 30 s) and give it less context.
SHORTEST_CUT_FRAMES = WINDOW_FRAMES // 2
# Less speech than this behind a transcript's last timestamp is that timestamp's inaccuracy.
LEAST_REST_S = 0.8
# How far a timestamp may lie behind and before the beginning of the speech that it precedes, and what is kept before.
EARLY_S, LATE_S, REST_PAD_S = 0.5, 1.0, 0.1
# Which pause to cut in: half a second is as good as any longer one, and the end of the window is worth as much again.
ENOUGH_PAUSE_FRAMES = SAMPLE_RATE // 2 // FRAME_SAMPLES
LATENESS_WORTH_FRAMES = ENOUGH_PAUSE_FRAMES


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of a recording of at most 30 s. ``start`` is in seconds from the recording's beginning, ``samples``
    int16 [n] at 16 kHz, ``speech`` where it has speech: (begin, end) in seconds from the window's start."""

    index: int
    start: float
    samples: Int16
    speech: tuple[tuple[float, float], ...]

    @property
    def speech_seconds(self) -> float:
        return sum(end - begin for begin, end in self.speech)

    def halves(self) -> tuple[Window, Window]:
        """The window in two, cut in the pause nearest to its middle; in the middle if it has none."""
        middle = len(self.samples) / SAMPLE_RATE / 2
        pauses = [(end + begin) / 2 for (_, end), (begin, _) in itertools.pairwise(self.speech)]
        seconds = min(pauses, key=lambda pause: abs(pause - middle), default=middle)
        left = tuple((begin, min(end, seconds)) for begin, end in self.speech if begin < seconds)
        cut = round(seconds * SAMPLE_RATE)
        return Window(self.index, self.start, self.samples[:cut], left), self._from(seconds)

    def after(self, seconds: float) -> Window | None:
        """The window's rest from ``seconds`` on, or None if there is next to no speech in it.

        Whisper at times ends a transcript before the speech ends. What it left is then decoded as a window of its own,
        as openai-whisper does, which goes on from the last timestamp.
        """
        near = [begin for begin, _ in self.speech if -EARLY_S <= begin - seconds <= LATE_S]
        if near:  # the timestamp meant a pause that voice activity knows better
            seconds = max(0.0, min(near, key=lambda begin: abs(begin - seconds)) - REST_PAD_S)
        window = self._from(seconds)
        shorter = len(window.samples) < len(self.samples)
        return window if shorter and window.speech_seconds >= LEAST_REST_S else None

    def _from(self, seconds: float) -> Window:
        rest = tuple((max(begin, seconds) - seconds, end - seconds) for begin, end in self.speech if end > seconds)
        return Window(self.index, self.start + seconds, self.samples[round(seconds * SAMPLE_RATE) :], rest)


@dataclass(slots=True)
class _Span:
    """Frames begin to end, end not included."""

    begin: int
    end: int


class WindowCutter:
    """Takes samples and the probabilities of their frames, in any portions, and gives windows as they are complete.

    A recording of up to 30 s with any speech is one window, whole, as openai-whisper would take it. In a longer one
    windows hold the speech: stretches of at least ``min_speech_s`` with ``pad_s`` around them, where pauses of up to
    ``max_pause_s`` are part of the window. They do not overlap and are never longer than 30 s; a longer run of speech
    is cut in a pause, or, if it has none, at its least likely speech.

    What is held never exceeds 31 s and the portion last given.
    """

    def __init__(self, settings: VadSettings):
        self._threshold = settings.threshold
        self._threshold_in_speech = max(settings.threshold - HYSTERESIS, min(settings.threshold, 0.01))
        self._min_speech = max(1, _frames(settings.min_speech_s))
        self._min_silence = max(1, _frames(settings.min_silence_s))
        self._pad = _frames(settings.pad_s)
        self._max_pause = _frames(settings.max_pause_s)

        self._portions: list[Int16] = [np.zeros(0, np.int16)]  # what is held, joined where a window is taken from it
        self._dropped = 0  # frames before the first held
        self._total = 0  # samples taken
        self._frame = 0  # frames judged
        self._probabilities: list[float] = []  # of the frames held

        self._stretch: _Span | None = None  # above the threshold and not ended, perhaps too short yet
        self._begin: int | None = None  # of the window being filled
        self._previous_end = 0  # of the window before
        self._speech: list[_Span] = []  # in the window being filled
        self._cut: list[tuple[_Span, list[_Span]]] = []  # windows not yet given, with their speech
        self._index = 0
        self._heard_speech = False

    @property
    def duration(self) -> float:
        """Seconds taken so far."""
        return self._total / SAMPLE_RATE

    def push(self, samples: Int16, probabilities: Float32) -> list[Window]:
        """Takes int16 [n], and the probabilities [m] of the frames completed by them."""
        self._take(samples)
        for probability in probabilities:
            self._judge(float(probability))
        if self._frame * FRAME_SAMPLES <= WINDOW_SAMPLES:  # the recording may yet be a single window
            return []
        windows = self._give()
        self._forget()
        return windows

    def finish(self, probabilities: Float32) -> list[Window]:
        """Takes the probability of the last frame if it is incomplete, and gives the windows that are left."""
        for probability in probabilities:
            self._judge(float(probability))
        if self._frame != math.ceil(self._total / FRAME_SAMPLES):
            raise ValueError(f"{self._frame} probabilities for {self._total} samples")
        if self._total <= WINDOW_SAMPLES:
            spoken = [*itertools.chain.from_iterable(speech for _, speech in self._cut), *self._speech]
            self._cut = [(_Span(0, self._frame), spoken)] if self._heard_speech else []
        elif self._begin is not None:
            self._drop_short_stretch()
            self._close()
        return self._give()

    def _take(self, samples: Int16) -> None:
        self._portions.append(samples)
        self._total += len(samples)

    def _held(self) -> Int16:
        if len(self._portions) > 1:
            self._portions = [np.concatenate(self._portions)]
        return self._portions[0]

    def _judge(self, probability: float) -> None:
        now = self._frame
        self._frame += 1
        self._probabilities.append(probability)
        if self._stretch is None:
            if probability >= self._threshold:
                self._stretch = _Span(now, now + 1)
        elif probability >= self._threshold_in_speech:
            self._stretch.end = now + 1
        elif self._frame - self._stretch.end >= self._min_silence:
            self._stretch = None
        if self._stretch is not None and self._stretch.end - self._stretch.begin >= self._min_speech:
            self._add_speech(self._stretch)
        if self._begin is not None:
            if self._stretch is None and self._frame - self._speech[-1].end > self._max_pause:
                self._close()
            elif self._frame - self._begin >= WINDOW_FRAMES + LOOKAHEAD_FRAMES:
                self._cut_long_window()

    def _add_speech(self, stretch: _Span) -> None:
        self._heard_speech = True
        if self._begin is None:
            self._begin = max(self._previous_end, stretch.begin - self._pad)
        begin = max(stretch.begin, self._begin)  # a stretch may have been cut
        if self._speech and begin <= self._speech[-1].end:
            self._speech[-1].end = stretch.end
        else:
            self._speech.append(_Span(begin, stretch.end))

    def _close(self) -> None:
        """Ends the window being filled after its last speech."""
        while self._begin is not None and self._speech[-1].end - self._begin > WINDOW_FRAMES:
            self._cut_long_window()
        if self._begin is not None:
            end = min(self._speech[-1].end + self._pad, self._begin + WINDOW_FRAMES, self._frame)
            self._end_window(end, [])

    def _cut_long_window(self) -> None:
        """Ends the window being filled at the best place for a cut, and begins the next one there."""
        assert self._begin is not None
        spans = list(self._speech)
        if self._stretch is not None and self._stretch.begin > spans[-1].end:
            spans.append(self._stretch)  # too short so far, but it may be the beginning of a word
        cut = self._best_cut(spans, self._begin)
        last = next(span for span in reversed(spans) if span.begin < cut)
        rest = [_Span(max(span.begin, cut), span.end) for span in self._speech if span.end > cut]
        self._end_window(min(cut, last.end + self._pad), rest)
        if rest:
            self._begin = max(cut, rest[0].begin - self._pad)

    def _best_cut(self, spans: list[_Span], begin: int) -> int:
        earliest, latest = begin + SHORTEST_CUT_FRAMES, begin + WINDOW_FRAMES
        pauses = [(before.end, after.begin) for before, after in itertools.pairwise(spans)]
        pauses.append((spans[-1].end, self._frame))
        best, best_score = None, -1.0
        for quiet, loud in pauses:
            middle = min((quiet + loud) // 2, latest)
            if loud > quiet and quiet <= middle and earliest <= middle:
                lateness = (middle - earliest) / (latest - earliest)
                score = min(loud - quiet, ENOUGH_PAUSE_FRAMES) + lateness * LATENESS_WORTH_FRAMES
                if score > best_score:
                    best, best_score = middle, score
        if best is not None:
            return best
        last_third = range(latest - WINDOW_FRAMES // 3, latest)
        return min(last_third, key=lambda frame: self._probabilities[frame - self._dropped])

    def _end_window(self, end: int, rest: list[_Span]) -> None:
        assert self._begin is not None
        spoken = [_Span(span.begin, min(span.end, end)) for span in self._speech if span.begin < end]
        self._cut.append((_Span(self._begin, end), spoken))
        self._previous_end, self._begin, self._speech = end, None, rest

    def _drop_short_stretch(self) -> None:
        if self._stretch is not None and self._stretch.end - self._stretch.begin < self._min_speech:
            self._stretch = None

    def _give(self) -> list[Window]:
        if not self._cut:
            return []
        windows, held = [], self._held()
        for span, spoken in self._cut:
            first, last = (frame * FRAME_SAMPLES for frame in (span.begin - self._dropped, span.end - self._dropped))
            samples = held[first:last]
            windows.append(
                Window(
                    index=self._index,
                    start=_seconds(span.begin),
                    samples=samples if len(samples) == len(held) else samples.copy(),  # a view would keep all
                    speech=tuple((_seconds(s.begin - span.begin), _seconds(s.end - span.begin)) for s in spoken),
                )
            )
            self._index += 1
        self._cut.clear()
        return windows

    def _forget(self) -> None:
        """Drops what no window can begin with any more."""
        if self._begin is not None:
            needed = self._begin
        else:
            next_speech = self._frame if self._stretch is None else self._stretch.begin
            needed = max(self._previous_end, next_speech - self._pad)
        count = max(0, needed - self._dropped)
        if count:
            self._portions = [self._held()[count * FRAME_SAMPLES :].copy()]
            del self._probabilities[:count]
            self._dropped += count


def _seconds(frames: int) -> float:
    return frames * FRAME_SAMPLES / SAMPLE_RATE


def _frames(seconds: float) -> int:
    return math.ceil(seconds * SAMPLE_RATE / FRAME_SAMPLES)
