from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import UploadFile

from serve_app.api.form import MAX_PROMPT_CHARACTERS, AudioRequest, ServedModel, parse_form
from serve_app.api.formats import RESPONSE_FORMATS
from serve_app.engine.options import Task, TranscribeOptions
from serve_app.errors import InvalidRequest, ModelNotFound, ServiceError

BASE = ServedModel("base", ("en", "de", "ja", "jw", "no"))
TINY_EN = ServedModel("tiny.en", {"en"})
Item = tuple[str, str | UploadFile]


def upload(content: bytes = b"sound") -> UploadFile:
    return UploadFile(io.BytesIO(content), size=len(content), filename="a.wav")


def parse(*items: Item, task: Task = "transcribe", model: ServedModel = BASE) -> AudioRequest:
    """A form that is complete but for what ``items`` add or replace."""
    given_names = {name for name, _ in items}
    complete: list[Item] = [("file", upload()), ("model", model.name)]
    return parse_form(
        [item for item in complete if item[0] not in given_names] + list(items), TranscribeOptions(task=task), model
    )


def refused(*items: Item, **keywords: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(*items, **keywords)
    return caught.value


def test_file_and_model_are_enough() -> None:
    request = parse()
    assert request.response_format == "json"
    assert request.options == TranscribeOptions()


def test_every_parameter_arrives() -> None:
    request = parse(
        ("language", "German"),
        ("prompt", "Guten Tag"),
        ("temperature", "0.4"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "segment"),
        ("stream", "false"),
        ("chunking_strategy", "auto"),
    )
    assert request.response_format == "verbose_json"
    assert request.options == TranscribeOptions(language="de", prompt="Guten Tag", temperature=0.4)


def test_a_translation_takes_the_language_spoken() -> None:
    options = parse(("language", "de"), task="translate").options
    assert (options.task, options.language) == ("translate", "de")


def test_options_from_elsewhere_are_kept() -> None:
    options = TranscribeOptions(priority="batch", timeout_s=5)
    request = parse_form([("file", upload()), ("model", "base"), ("language", "en")], options, BASE)
    assert request.options == TranscribeOptions(priority="batch", timeout_s=5, language="en")


@pytest.mark.parametrize("name", ["base", "whisper-1"])
def test_the_model_has_two_names(name: str) -> None:
    assert parse(("model", name))


@pytest.mark.parametrize("name", ["", "large-v3", "BASE", "x" * 5000])
def test_a_model_that_is_not_served_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound, match="is not served here; served: `base`, `whisper-1`") as caught:
        parse(("model", name))
    assert caught.value.param == "model"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("missing", ["file", "model"])
def test_file_and_model_are_required(missing: str) -> None:
    items: list[Item] = [("file", upload()), ("model", "base")]
    with pytest.raises(InvalidRequest, match=f"must provide `{missing}`") as caught:
        parse_form([item for item in items if item[0] != missing], TranscribeOptions(), BASE)
    assert (caught.value.param, caught.value.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    ("items", "param", "message"),
    [
        ([("file", "sound")], "file", "must be an uploaded file"),
        ([("file", upload(b""))], "file", "is empty"),
        ([("model", upload())], "model", "must be text"),
        ([("language", "xx")], "language", "'xx' is not known. Known: de, en, ja, jw, no"),
        ([("language", "")], "language", "is not known"),
        ([("language", "fr")], "language", "'fr' is not known"),
        ([("temperature", "hot")], "temperature", "from 0 to 1, not 'hot'"),
        ([("temperature", "")], "temperature", "from 0 to 1"),
        ([("temperature", "-0.1")], "temperature", "from 0 to 1"),
        ([("temperature", "1.01")], "temperature", "from 0 to 1"),
        ([("temperature", "nan")], "temperature", "from 0 to 1"),
        ([("response_format", "xml")], "response_format", "one of json, text, srt, verbose_json, vtt, not 'xml'"),
        ([("response_format", "diarized_json")], "response_format", "not supported"),
        ([("timestamp_granularities[]", "segment")], "timestamp_granularities", "needs response_format verbose_json"),
        ([("timestamp_granularities[]", "word")], "timestamp_granularities", "not supported yet"),
        ([("timestamp_granularities[]", "letter")], "timestamp_granularities", "must be segment, not 'letter'"),
        ([("stream", "true")], "stream", "not supported yet"),
        ([("stream", "maybe")], "stream", "true or false"),
        ([("chunking_strategy", '{"type":"server_vad"}')], "chunking_strategy", "takes only auto"),
        ([("chunking_strategy[type]", "server_vad")], "chunking_strategy", "takes only auto"),
        ([("include[]", "logprobs")], "include", "not supported"),
        ([("known_speaker_names[]", "ann")], "known_speaker_names", "not supported"),
        ([("known_speaker_references[0]", "data:")], "known_speaker_references", "not supported"),
        ([("keywords[]", "ray")], "keywords", "not supported"),
        ([("languages[]", "en")], "languages", "not supported"),
        ([("beam_size", "5")], "beam_size", "Unknown parameter: `beam_size`"),
        ([("language[]", "en")], "language[]", "Unknown parameter"),
        ([("file2", upload())], "file2", "Unknown parameter"),
        ([("prompt", "x" * (MAX_PROMPT_CHARACTERS + 1))], "prompt", "at most 65,536"),
        ([("language", "en"), ("language", "de")], "language", "more than once"),
        ([("model", "base"), ("model", "base")], "model", "more than once"),
        ([("file", upload()), ("file", upload())], "file", "more than once"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(items: list[Item], param: str, message: str) -> None:
    error = refused(*items)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]", "timestamp_granularities[0]"])
def test_lists_come_in_every_spelling(name: str) -> None:
    assert parse((name, "segment"), (name, "segment"), ("response_format", "verbose_json"))


@pytest.mark.parametrize("name", ["stream", "chunking_strategy", "timestamp_granularities[]"])
def test_translations_know_fewer_parameters(name: str) -> None:
    assert refused((name, "false"), task="translate").code == "unknown_parameter"


def test_an_english_only_model_hears_english() -> None:
    assert parse(model=TINY_EN).options.language == "en"
    assert parse(("language", "English"), model=TINY_EN).options.language == "en"


def test_an_english_only_model_refuses_other_languages() -> None:
    error = refused(("language", "de"), model=TINY_EN)
    assert error.param == "language"
    assert "`tiny.en` knows English only" in error.message


def test_an_english_only_model_does_not_translate() -> None:
    assert "knows English only" in refused(task="translate", model=TINY_EN).message


def test_a_blank_prompt_is_none() -> None:
    assert parse(("prompt", " \n")).options.prompt is None


NAMES = """file model language prompt temperature response_format stream chunking_strategy timestamp_granularities
timestamp_granularities[] include[] keywords x"""
names = st.sampled_from(NAMES.split())
values = st.text() | st.sampled_from(["base", "en", "0.5", "json", "false", "auto", "segment"]) | st.builds(upload)


@given(st.lists(st.tuples(names | st.text(), values)), st.sampled_from(["transcribe", "translate"]))
def test_any_form_makes_a_request_or_a_4xx_that_says_why(items: list[Item], task: Task) -> None:
    outcome: AudioRequest | ServiceError
    try:
        outcome = parse_form(items, TranscribeOptions(task=task), BASE)
    except ServiceError as error:
        outcome = error
    if isinstance(outcome, ServiceError):
        assert 400 <= outcome.status < 500
        assert outcome.message
        assert outcome.param is not None
        assert len(outcome.param) <= 80
    else:
        assert {"file", "model"} <= {name for name, _ in items}
        assert outcome.options.language in {None, *BASE.languages}
        assert 0 <= outcome.options.temperature <= 1


@given(
    st.sampled_from(RESPONSE_FORMATS),
    st.sampled_from(sorted(BASE.languages)),
    st.floats(0, 1),
    st.text(max_size=50),
    st.randoms(),
)
def test_the_order_of_fields_does_not_matter(
    response_format: str, language: str, temperature: float, prompt: str, random: Any
) -> None:
    items: list[Item] = [
        ("file", upload()),
        ("model", "whisper-1"),
        ("response_format", response_format),
        ("language", language),
        ("temperature", repr(temperature)),
        ("prompt", prompt),
    ]
    random.shuffle(items)
    request = parse_form(items, TranscribeOptions(), BASE)
    assert request.response_format == response_format
    assert request.options == TranscribeOptions(
        language=language, temperature=temperature, prompt=prompt if prompt.strip() else None
    )
