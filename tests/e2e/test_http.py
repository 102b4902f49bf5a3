"""The application over HTTP, with OpenAI's own client."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.running import running
from serve_app.settings import Settings


@pytest.fixture(scope="module")
def client(application: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{application}/v1", api_key="unused", max_retries=0)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_a_recording_is_transcribed(client: openai.OpenAI, sample: Path, sample_text: str) -> None:
    transcription = client.audio.transcriptions.create(model="whisper-1", file=sample)
    assert words(transcription.text) == words(sample_text)


def test_the_language_is_detected_and_segments_carry_times(
    client: openai.OpenAI, sample: Path, sample_text: str
) -> None:
    verbose = client.audio.transcriptions.create(model="base", file=sample, response_format="verbose_json")
    assert verbose.language == "english"
    assert verbose.duration == pytest.approx(13, abs=1)
    assert verbose.segments
    ends = [0.0]
    for segment in verbose.segments:
        assert ends[-1] <= segment.start < segment.end <= verbose.duration + 0.01
        ends.append(segment.end)
    assert words("".join(segment.text for segment in verbose.segments)) == words(sample_text)


@pytest.mark.parametrize(("format", "mark"), [("srt", "00:00:00,000 --> "), ("vtt", "WEBVTT"), ("text", "recording")])
def test_plain_formats(client: openai.OpenAI, sample: Path, format: Any, mark: str) -> None:
    assert mark in client.audio.transcriptions.create(model="whisper-1", file=sample, response_format=format)


def test_translation(client: openai.OpenAI, shared_audio: Path) -> None:
    german = shared_audio / "multi" / "de-thorsten-01.flac"
    text = client.audio.translations.create(model="whisper-1", file=german).text
    assert "delicious" in words(text)  # köstlich


def test_other_languages_are_recognised(client: openai.OpenAI, shared_audio: Path) -> None:
    for file, language in (("de-thorsten-01.flac", "german"), ("ja-azure-training-audio.flac", "japanese")):
        verbose = client.audio.transcriptions.create(
            model="whisper-1", file=shared_audio / "multi" / file, response_format="verbose_json"
        )
        assert verbose.language == language


def test_a_prompt_steers_the_spelling(client: openai.OpenAI, sample: Path, sample_text: str) -> None:
    plain = client.audio.transcriptions.create(model="whisper-1", file=sample).text
    careless = "so this is all lower case and there is no punctuation at all it just goes on and on like that " * 4
    prompted = client.audio.transcriptions.create(model="whisper-1", file=sample, prompt=careless).text
    assert words(plain) == words(prompted) == words(sample_text)
    assert plain.startswith("This")
    assert prompted.startswith("this")


def test_a_temperature_samples(client: openai.OpenAI, sample: Path) -> None:
    texts = {client.audio.transcriptions.create(model="whisper-1", file=sample, temperature=1.0).text for _ in range(4)}
    assert len(texts) > 1


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert {"base", "whisper-1"} <= {model.id for model in client.models.list()}


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI, sample: Path) -> None:
    with pytest.raises(openai.NotFoundError, match="whisper-9"):
        client.audio.transcriptions.create(model="whisper-9", file=sample)


def test_what_is_not_there_yet_is_refused(client: openai.OpenAI, sample: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.audio.transcriptions.create(model="whisper-1", file=sample, stream=True)
    with pytest.raises(openai.BadRequestError, match="word"):
        client.audio.transcriptions.create(
            model="whisper-1", file=sample, response_format="verbose_json", timestamp_granularities=["word"]
        )


def test_a_file_that_is_no_audio_is_refused_and_the_next_one_served(
    client: openai.OpenAI, sample: Path, sample_text: str
) -> None:
    with pytest.raises(openai.BadRequestError):
        client.audio.transcriptions.create(model="whisper-1", file=("talk.mp3", b"this is text, not sound" * 100))
    assert words(client.audio.transcriptions.create(model="whisper-1", file=sample).text) == words(sample_text)


def test_silence_has_no_text(client: openai.OpenAI, shared_audio: Path) -> None:
    for file in sorted((shared_audio / "nospeech").iterdir()):
        assert client.audio.transcriptions.create(model="whisper-1", file=file).text == "", file.name


def test_a_recording_of_minutes_is_cut_into_windows_in_order(
    client: openai.OpenAI, shared_audio: Path, manifest: list[dict[str, Any]]
) -> None:
    row = next(r for r in manifest if r["file"] == "synth_long/piper-modern1.mp3")
    verbose = client.audio.transcriptions.create(
        model="whisper-1", file=shared_audio / row["file"], response_format="verbose_json", language="en"
    )
    said, meant = words(verbose.text), words(row["text"])
    assert abs(len(said) - len(meant)) < 0.05 * len(meant)
    assert said[:5] == meant[:5]
    assert len({segment.seek for segment in verbose.segments or []}) > 3
    starts = [segment.start for segment in verbose.segments or []]
    assert starts == sorted(starts)


def test_many_recordings_at_once(application: str, sample: Path, sample_text: str) -> None:
    def transcribe(_: int) -> httpx.Response:
        with sample.open("rb") as audio:
            url = f"{application}/v1/audio/transcriptions"
            return httpx.post(url, files={"file": audio}, data={"model": "whisper-1", "language": "en"}, timeout=300)

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(transcribe, range(16)))
    assert {response.status_code for response in responses} == {200}
    assert all(words(json.loads(response.text)["text"]) == words(sample_text) for response in responses)


def test_the_stages_are_ready(application: str) -> None:
    assert httpx.get(f"{application}/healthz").status_code == 200
    assert httpx.get(f"{application}/readyz").json()["stages"] == {"features": True, "encoder": True, "decoder": True}


def test_an_address_that_serve_does_not_listen_on_is_refused(application: str) -> None:
    with (
        pytest.raises(RuntimeError, match="already runs in this cluster"),
        running(Settings(http={"port": 1}, app_name="other")),
    ):
        pass
