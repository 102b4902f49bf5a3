"""A transcript in each of OpenAI's response formats (pure)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from serve_app.api.languages import language_name
from serve_app.api.schemas import Transcription, Usage, VerboseSegment, VerboseTranscription
from serve_app.engine.transcript import Transcript

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
RESPONSE_FORMATS: tuple[str, ...] = get_args(ResponseFormat)

# OpenAI sends subtitles as text/plain too, and clients choose between JSON and text by this header.
JSON = "application/json"
PLAIN = "text/plain; charset=utf-8"


class Rendered(NamedTuple):
    body: str
    media_type: str


def render(transcript: Transcript, response_format: ResponseFormat) -> Rendered:
    match response_format:
        case "json":
            return Rendered(to_json(transcript), JSON)
        case "verbose_json":
            return Rendered(to_verbose_json(transcript), JSON)
        case "text":
            return Rendered(transcript.text.strip() + "\n", PLAIN)
        case "srt":
            return Rendered(to_srt(transcript), PLAIN)
        case "vtt":
            return Rendered(to_vtt(transcript), PLAIN)


def to_json(transcript: Transcript) -> str:
    result = Transcription(text=transcript.text.strip(), usage=_usage(transcript))
    return result.model_dump_json(exclude_none=True)


def to_verbose_json(transcript: Transcript) -> str:
    result = VerboseTranscription(
        task=transcript.task,
        # A translation's text is English, whatever was spoken.
        language=language_name("en" if transcript.task == "translate" else transcript.language),
        duration=transcript.duration,
        text=transcript.text.strip(),
        segments=[VerboseSegment.model_validate(segment, from_attributes=True) for segment in transcript.segments],
        usage=_usage(transcript),
    )
    return result.model_dump_json(exclude_none=True)


def to_srt(transcript: Transcript) -> str:
    return "".join(
        f"{number}\n{timestamp(start, ',')} --> {timestamp(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(transcript), start=1)
    )


def to_vtt(transcript: Transcript) -> str:
    cues = (
        f"{timestamp(start, '.')} --> {timestamp(end, '.')}\n{_escape_vtt(text)}\n\n"
        for start, end, text in _cues(transcript)
    )
    return "WEBVTT\n\n" + "".join(cues)


def timestamp(seconds: float, decimal_mark: str) -> str:
    """``HH:MM:SS.mmm``, with more digits for the hours where there are more than 99."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def _usage(transcript: Transcript) -> Usage | None:
    """OpenAI counts started seconds, and reports usage for transcriptions only."""
    if transcript.task == "translate":
        return None
    return Usage(type="duration", seconds=math.ceil(round(transcript.duration, 3)))


def _cues(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    """The segments that have text. In a cue an empty line would end it, and an arrow would be taken for its times: as
    openai-whisper's writers do, ``-->`` becomes ``->``."""
    for segment in transcript.segments:
        lines = (line.strip() for line in segment.text.splitlines())
        text = re.sub("-{2,}>", "->", "\n".join(line for line in lines if line))
        if text:
            yield segment.start, segment.end, text


def _escape_vtt(text: str) -> str:
    """In WebVTT ``<`` opens a tag and ``&`` a character reference."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
