"""Transcripts: what comes out, and how windows' tokens become segments (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serve_app.engine.constants import FRAMES_PER_SECOND, TIMESTAMP_SECONDS
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech. ``start`` and ``end`` are seconds in the recording; ``seek`` is the start of its window in
    frames of 10 ms, as in OpenAI's verbose JSON; the last four fields are those of openai-whisper."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int] = field(default_factory=list)
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class Transcript:
    """The text of one recording. ``language`` is Whisper's code (``"en"``); ``duration`` is in seconds."""

    task: str
    language: str
    duration: float
    text: str
    segments: list[Segment] = field(default_factory=list)


def window_segments(decoded: DecodedWindow, tokens: Tokens, *, start: float, seconds: float) -> list[Segment]:
    """Cuts a decoded window at its timestamps, as openai-whisper does; ids are left 0, ``assemble`` numbers them.

    start: of the window in the recording; seconds: its length. Text behind the last pair of timestamps, which
    openai-whisper would decode again from there, is kept as a segment up to the window's end.
    """
    begin = tokens.vocabulary.timestamp_begin
    ids = decoded.tokens
    cuts = [i for i in range(1, len(ids)) if ids[i - 1] >= begin and ids[i] >= begin]
    segments = []
    for first, last in itertools.pairwise([0, *cuts, len(ids)]):
        piece = ids[first:last]
        text = tokens.text(piece)
        if not text.strip():
            continue
        times = [(t - begin) * TIMESTAMP_SECONDS for t in piece if t >= begin]
        opens = times[0] if piece[0] >= begin else 0.0
        closes = times[-1] if len(times) > 1 and piece[-1] >= begin else seconds
        # the model may point past the window's sound, into the silence it was padded with
        opens, closes = min(opens, seconds), min(max(opens, closes), seconds)
        segments.append(
            Segment(
                id=0,
                seek=round(start * FRAMES_PER_SECOND),
                start=start + opens,
                end=start + closes,
                text=text,
                tokens=piece,
                temperature=decoded.temperature,
                avg_logprob=decoded.avg_logprob,
                compression_ratio=decoded.compression_ratio,
                no_speech_prob=decoded.no_speech_prob,
            )
        )
    return segments


def assemble(windows: Iterable[list[Segment]], *, task: str, language: str, duration: float) -> Transcript:
    """The transcript of a recording from its windows' segments, in order."""
    segments = [replace(s, id=i) for i, s in enumerate(itertools.chain.from_iterable(windows))]
    text = "".join(s.text for s in segments).strip()
    return Transcript(task=task, language=language, duration=duration, text=text, segments=segments)
