from __future__ import annotations

import html
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.formats import RESPONSE_FORMATS, render, timestamp
from serve_app.engine.transcript import Segment, Transcript
from tests.api.service import TRANSCRIPT

times = st.lists(st.floats(0, 2_000_000), max_size=8).map(sorted)
texts = st.text(st.characters(codec="utf-8")) | st.sampled_from([" a --> b", "--->", "a\n\nb", "\r\n", "R&D &lt; <b>"])


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    segments = [
        Segment(i, 0, start, end, draw(texts)) for i, (start, end) in enumerate(itertools.pairwise(draw(times)))
    ]
    return Transcript("transcribe", "en", segments[-1].end if segments else 0.0, draw(texts), segments)


def seconds(mark: str) -> float:
    hours, minutes, rest = mark.replace(",", ".").split(":")
    assert len(hours) >= 2
    assert len(minutes) == 2
    assert len(rest) == 6
    assert int(minutes) < 60
    assert float(rest) < 60
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def cues(blocks: list[str]) -> list[tuple[float, float, str]]:
    parsed = []
    for block in blocks:
        match = re.fullmatch(r"([\d:.,]+) --> ([\d:.,]+)\n(.+)", block, re.DOTALL)
        assert match, block
        parsed.append((seconds(match[1]), seconds(match[2]), match[3]))
    return parsed


def blocks_of(subtitles: str) -> list[str]:
    assert subtitles == "" or subtitles.endswith("\n\n")
    return subtitles.split("\n\n")[:-1]


def spoken(transcript: Transcript) -> list[str]:
    """What is to be read in the subtitles: the segments' lines, with arrows that cannot be taken for times."""
    lines = ([line.strip() for line in segment.text.splitlines()] for segment in transcript.segments)
    text = ("\n".join(line for line in segment if line) for segment in lines)
    return [re.sub("--+>", "->", segment) for segment in text if segment]


@given(transcripts())
def test_srt_is_numbered_cues_in_order_that_keep_the_text(transcript: Transcript) -> None:
    blocks = blocks_of(render(transcript, "srt").body)
    assert [block.split("\n")[0] for block in blocks] == [str(n + 1) for n in range(len(blocks))]
    parsed = cues([block.split("\n", 1)[1] for block in blocks])
    marks = [mark for start, end, _ in parsed for mark in (start, end)]
    assert marks == sorted(marks)
    assert [text for _, _, text in parsed] == spoken(transcript)


@given(transcripts())
def test_vtt_is_a_header_and_cues_in_order_that_keep_the_text(transcript: Transcript) -> None:
    header, *blocks = blocks_of(render(transcript, "vtt").body)
    assert header == "WEBVTT"
    parsed = cues(blocks)
    marks = [mark for start, end, _ in parsed for mark in (start, end)]
    assert marks == sorted(marks)
    assert all("<" not in text for _, _, text in parsed)
    unescaped = [text.replace("&lt;", "<").replace("&amp;", "&") for _, _, text in parsed]
    assert unescaped == spoken(transcript)


@given(transcripts())
def test_an_arrow_stands_between_times_only(transcript: Transcript) -> None:
    for response_format in ("srt", "vtt"):
        body = render(transcript, response_format).body
        assert body.count("-->") == len(spoken(transcript))


@given(st.floats(0, 10_000_000))
def test_a_timestamp_is_the_nearest_millisecond(value: float) -> None:
    assert seconds(timestamp(value, ".")) == pytest.approx(value, abs=0.000501)


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (0, "00:00:00.000"),
        (59.9994, "00:00:59.999"),
        (59.9996, "00:01:00.000"),
        (3599.9996, "01:00:00.000"),
        (99 * 3600 + 3599.9996, "100:00:00.000"),
        (1234 * 3600 + 62.5, "1234:01:02.500"),
    ],
)
def test_timestamps_carry_over(value: float, mark: str) -> None:
    assert timestamp(value, ".") == mark


def test_srt() -> None:
    assert render(TRANSCRIPT, "srt").body == (
        "1\n00:00:00,000 --> 00:01:00,000\nSo it begins.\n\n"
        "2\n00:01:00,000 --> 00:01:01,240\nR&D costs < 3 € a day.\n\n"
    )


def test_vtt() -> None:
    assert render(TRANSCRIPT, "vtt").body == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:01:00.000\nSo it begins.\n\n"
        "00:01:00.000 --> 00:01:01.240\nR&amp;D costs &lt; 3 € a day.\n\n"
    )


def test_vtt_shows_as_it_was_spoken() -> None:
    assert "R&D costs < 3 € a day." in html.unescape(render(TRANSCRIPT, "vtt").body)


def test_text_is_a_line() -> None:
    assert render(TRANSCRIPT, "text").body == "So it begins. R&D costs < 3 € a day.\n"


def test_json_counts_started_seconds() -> None:
    assert json.loads(render(TRANSCRIPT, "json").body) == {
        "text": "So it begins. R&D costs < 3 € a day.",
        "usage": {"type": "duration", "seconds": 62},
    }


def test_verbose_json_has_all_of_openai_s_fields() -> None:
    body = json.loads(render(TRANSCRIPT, "verbose_json").body)
    first = body.pop("segments")[0]
    assert body == {
        "task": "transcribe",
        "language": "english",
        "duration": 61.25,
        "text": "So it begins. R&D costs < 3 € a day.",
        "usage": {"type": "duration", "seconds": 62},
    }
    assert first == {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": 60.0,
        "text": " So it begins.",
        "tokens": [50364, 407, 309, 7338, 13, 50414],
        "temperature": 0.0,
        "avg_logprob": -0.25,
        "compression_ratio": 1.1,
        "no_speech_prob": 0.01,
    }


def test_a_translation_is_english_and_has_no_usage() -> None:
    translation = Transcript("translate", "de", 1.0, "Hello.")
    assert json.loads(render(translation, "verbose_json").body) == {
        "task": "translate",
        "language": "english",
        "duration": 1.0,
        "text": "Hello.",
        "segments": [],
    }
    assert json.loads(render(translation, "json").body) == {"text": "Hello."}


@given(transcripts())
def test_verbose_json_keeps_every_segment_as_it_is(transcript: Transcript) -> None:
    segments = json.loads(render(transcript, "verbose_json").body)["segments"]
    assert [segment["text"] for segment in segments] == [segment.text for segment in transcript.segments]
    assert [segment["start"] for segment in segments] == [round(segment.start, 3) for segment in transcript.segments]


@pytest.mark.parametrize("response_format", RESPONSE_FORMATS)
def test_silence_has_every_format(response_format: str) -> None:
    body, _ = render(Transcript("transcribe", "en", 0.0, ""), response_format)  # type: ignore[arg-type]
    assert "-->" not in body
    assert body == {"text": "\n", "srt": "", "vtt": "WEBVTT\n\n"}.get(response_format, body)
