"""The API as its users meet it: OpenAI's client, unchanged, over real HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.audio import TranscriptionVerbose, TranslationVerbose
from openai.types.audio.transcription import UsageDuration

from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript
from tests.api.conftest import Running, Serve
from tests.api.service import TRANSCRIPT, FixedService

RECORDING = ("meeting.wav", b"sound")


def test_a_recording_becomes_text(api: Running) -> None:
    transcription = api.openai().audio.transcriptions.create(file=RECORDING, model="whisper-1")
    assert transcription.text == TRANSCRIPT.text
    assert transcription.usage is not None
    assert isinstance(transcription.usage, UsageDuration)
    assert transcription.usage.seconds == 62
    assert api.service.asked == [(b"sound", TranscribeOptions(timeout_s=3600))]


@pytest.mark.parametrize("kind", ["path", "file", "bytes"])
def test_the_client_uploads_in_every_way_it_knows(api: Running, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "meeting.mp3"
    path.write_bytes(b"sound")
    with path.open("rb") as opened:
        uploads: dict[str, Any] = {"path": path, "file": opened, "bytes": b"sound"}
        api.openai().audio.transcriptions.create(file=uploads[kind], model="base")
    assert api.service.asked[-1][0] == b"sound"


def test_parameters_arrive(api: Running) -> None:
    api.openai().audio.transcriptions.create(
        file=RECORDING,
        model="base",
        language="de",
        prompt="Grüße aus 東京",
        temperature=0.2,
        response_format="verbose_json",
        timestamp_granularities=["segment"],
        chunking_strategy="auto",
        stream=False,
    )
    assert api.service.options == TranscribeOptions(
        language="de", prompt="Grüße aus 東京", temperature=0.2, timeout_s=3600
    )


def test_verbose_json_has_segments(api: Running) -> None:
    verbose = api.openai().audio.transcriptions.create(file=RECORDING, model="base", response_format="verbose_json")
    assert isinstance(verbose, TranscriptionVerbose)
    assert (verbose.language, verbose.duration) == ("english", 61.25)
    assert verbose.segments is not None
    assert [segment.text for segment in verbose.segments] == [segment.text for segment in TRANSCRIPT.segments]
    assert verbose.segments[1].tokens == TRANSCRIPT.segments[1].tokens


@pytest.mark.parametrize(
    ("response_format", "start"), [("text", "So it"), ("srt", "1\n00:00:00,000"), ("vtt", "WEBVTT")]
)
def test_text_formats_are_strings(api: Running, response_format: Any, start: str) -> None:
    text: Any = api.openai().audio.transcriptions.create(file=RECORDING, model="base", response_format=response_format)
    assert text.startswith(start)
    raw = api.post(data={"response_format": response_format})
    assert raw.headers["content-type"] == "text/plain; charset=utf-8"
    assert raw.content.decode() == text


def test_json_is_utf_8(api: Running) -> None:
    response = api.post()
    assert response.headers["content-type"] == "application/json"
    assert "3 €" in response.content.decode()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tests")
def test_a_translation(serve: Serve) -> None:
    api = serve(FixedService(Transcript("translate", "de", 2.0, "Good day.")))
    translations = api.openai().audio.translations
    assert translations.create(file=RECORDING, model="whisper-1").text == "Good day."
    assert api.service.options.task == "translate"
    verbose = translations.create(file=RECORDING, model="whisper-1", response_format="verbose_json")
    assert isinstance(verbose, TranslationVerbose)
    assert verbose.language == "english"


def test_a_translation_may_name_the_language_spoken(api: Running) -> None:
    assert api.post("/v1/audio/translations", {"language": "de"}).status_code == 200
    assert api.service.options.language == "de"


def test_models_are_listed_by_every_name(api: Running) -> None:
    models = api.openai().models.list()
    assert [model.id for model in models] == ["base", "whisper-1"]
    assert {model.created for model in models} == {1_700_000_000}


@pytest.mark.parametrize("name", ["base", "whisper-1"])
def test_a_model_is_found_by_name(api: Running, name: str) -> None:
    model = api.openai().models.retrieve(name)
    assert (model.id, model.object) == (name, "model")


def test_a_model_s_name_may_hold_a_slash(serve: Serve) -> None:
    api = serve(FixedService(model_name="openai/whisper-base"))
    assert api.openai().models.retrieve("openai/whisper-base").id == "openai/whisper-base"


def test_a_model_that_is_not_served_is_not_found(api: Running) -> None:
    client = api.openai()
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("large-v3")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="`large-v3` does not exist or is not served here"):
        client.audio.transcriptions.create(file=RECORDING, model="large-v3")


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"language": "klingon"}, "language"),
        ({"temperature": 2}, "temperature"),
        ({"stream": True}, "stream"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "verbose_json", "timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"chunking_strategy": {"type": "server_vad", "threshold": 0.5}}, "chunking_strategy"),
        ({"include": ["logprobs"]}, "include"),
        ({"known_speaker_names": ["ann", "bob"]}, "known_speaker_names"),
        ({"extra_body": {"beam_size": 5}}, "beam_size"),
        ({"extra_headers": {"X-Priority": "urgent"}}, "x-priority"),
        ({"extra_headers": {"X-Request-Timeout": "0"}}, "x-request-timeout"),
        ({"extra_headers": {"X-Request-Timeout": "soon"}}, "x-request-timeout"),
        ({"extra_headers": {"X-Request-Timeout": "inf"}}, "x-request-timeout"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request(api: Running, parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.openai().audio.transcriptions.create(**{"file": RECORDING, "model": "base"} | parameters)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert not api.service.asked


def test_an_empty_file_is_a_bad_request(api: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="`file` is empty"):
        api.openai().audio.transcriptions.create(file=("a.wav", b""), model="base")


@pytest.mark.parametrize("priority", ["interactive", "normal", "batch"])
def test_priority_is_a_header(api: Running, priority: str) -> None:
    assert api.post(headers={"X-Priority": priority}).status_code == 200
    assert api.service.options.priority == priority


@pytest.mark.parametrize(("asked", "given"), [("2.5", 2.5), ("1e9", 3600)])
def test_a_timeout_is_a_header_and_has_a_limit(api: Running, asked: str, given: float) -> None:
    assert api.post(headers={"X-Request-Timeout": asked}).status_code == 200
    assert api.service.options.timeout_s == given


def test_health_is_told_whatever_the_stages_do(serve: Serve) -> None:
    api = serve(FixedService(stages={}))
    assert api.get("/healthz").json() == {"status": "ok"}


def test_ready_when_every_stage_is(api: Running) -> None:
    response = api.get("/readyz")
    assert response.status_code == 200
    assert response.json()["stages"] == {"features": True, "encoder": True, "decoder": True}


@pytest.mark.parametrize(
    ("stages", "missing"),
    [({"features": True, "encoder": False, "decoder": False}, "encoder, decoder"), ({}, "every stage")],
)
def test_not_ready_names_the_missing_stages(serve: Serve, stages: dict[str, bool], missing: str) -> None:
    response = serve(FixedService(stages=stages)).get("/readyz")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == f"Not ready; without a replica: {missing}."


def test_the_root_says_where_to_look(api: Running) -> None:
    links = api.get("/").json()
    assert api.get(links["docs"]).status_code == 200
    assert api.get(links["models"]).status_code == 200


def raw_post(api: Running, body: bytes, content_type: str) -> httpx.Response:
    return api.http.post("/v1/audio/transcriptions", content=body, headers={"content-type": content_type})


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b'{"model":"base"}', "application/json", "Unsupported content type 'application/json'"),
        (b"model=base", "application/x-www-form-urlencoded", "send the recording as multipart/form-data"),
        (b"", "", "Unsupported content type ''"),
        (b"x", "multipart/form-data", "Missing boundary"),
        (b"no parts at all", "multipart/form-data; boundary=b", "The form cannot be read"),
        (b"", "multipart/form-data; boundary=b", "must provide `file`"),
        (
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
            "multipart/form-data; boundary=b",
            '"name" must be',
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--b--',
            "multipart/form-data; boundary=b; charset=undefined",
            "charset",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut off he',
            "multipart/form-data; boundary=b",
            "must provide `file`",
        ),
        (
            b"".join(b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n' for _ in range(2))
            + b"--b--",
            "multipart/form-data; boundary=b",
            "Too many files",
        ),
    ],
)
def test_a_malformed_form_is_a_bad_request(api: Running, body: bytes, content_type: str, message: str) -> None:
    response = raw_post(api, body, content_type)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_big_upload_arrives_whole(api: Running) -> None:
    content = bytes(range(256)) * 20_000
    api.openai().audio.transcriptions.create(file=io.BytesIO(content), model="base")
    assert api.service.asked[-1][0] == content


def test_documentation_describes_the_form(api: Running) -> None:
    form = json.dumps(api.get("/openapi.json").json()["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"])
    assert "multipart/form-data" in form
    assert '"format": "binary"' in form
    assert "timestamp_granularities[]" in form
