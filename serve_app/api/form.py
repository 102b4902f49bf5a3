"""The form of a transcription or translation request: what it may hold, and how it becomes options (pure).

Source: OpenAI's API reference. A parameter that is not there yet is refused by name, never ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile

from serve_app.api.formats import RESPONSE_FORMATS, ResponseFormat
from serve_app.api.languages import language_code
from serve_app.engine.options import Task, TranscribeOptions
from serve_app.errors import InvalidRequest, ModelNotFound

MODEL_ALIAS = "whisper-1"

# Whisper reads a prompt's last 223 tokens. The cap leaves room for whole transcripts and bounds the tokenizer's work.
MAX_PROMPT_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    languages: Collection[str]

    @property
    def names(self) -> list[str]:
        """All that a request may call it."""
        return list(dict.fromkeys([self.name, MODEL_ALIAS]))

    @property
    def english_only(self) -> bool:
        return set(self.languages) == {"en"}

    def require(self, name: str) -> None:
        if name not in self.names:
            served = ", ".join(f"`{known}`" for known in self.names)
            raise ModelNotFound(
                f"The model `{_shorten(name)}` does not exist or is not served here; served: {served}.", param="model"
            )


@dataclass(frozen=True, slots=True)
class AudioRequest:
    audio: UploadFile
    response_format: ResponseFormat
    options: TranscribeOptions


class Parameter(NamedTuple):
    """schema: OpenAPI's. parse: text to value, raising InvalidRequest. many: may be sent repeatedly, as ``name[]``."""

    schema: dict[str, object]
    parse: Callable[[str], object]
    many: bool = False


def _invalid(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` {message}", param=param, code="invalid_value")


def _not_yet(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` {message}", param=param, code="unsupported_parameter")


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _prompt(text: str) -> str | None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise _invalid("prompt", f"has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read.")
    return text if text.strip() else None


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise _invalid("temperature", f"must be a number from 0 to 1, not '{_shorten(text)}'.")
    return value


def _response_format(text: str) -> str:
    if text == "diarized_json":
        raise _not_yet("response_format", "diarized_json is not supported: speakers are not told apart.")
    if text not in RESPONSE_FORMATS:
        raise _invalid("response_format", f"must be one of {', '.join(RESPONSE_FORMATS)}, not '{_shorten(text)}'.")
    return text


def _granularity(text: str) -> str:
    if text == "word":
        raise _not_yet("timestamp_granularities", "word is not supported yet; segment is.")
    if text != "segment":
        raise _invalid("timestamp_granularities", f"must be segment, not '{_shorten(text)}'.")
    return text


def _stream(text: str) -> bool:
    match text.lower():
        case "false" | "0":
            return False
        case "true" | "1":
            raise _not_yet("stream", "is not supported yet; leave it out or send false.")
    raise _invalid("stream", f"must be true or false, not '{_shorten(text)}'.")


def _chunking_strategy(text: str) -> str:
    if text != "auto":
        raise _not_yet(
            "chunking_strategy",
            "takes only auto, which is what this server does: it cuts in pauses, found by voice activity detection.",
        )
    return text


COMMON: Mapping[str, Parameter] = {
    "model": Parameter(
        {
            "type": "string",
            "minLength": 1,
            "description": f"A name listed by /v1/models; `{MODEL_ALIAS}` is the served model.",
            "example": MODEL_ALIAS,
        },
        str,
    ),
    "prompt": Parameter(
        {
            "type": "string",
            "maxLength": MAX_PROMPT_CHARACTERS,
            "description": "Text that precedes the recording: steers spelling and style. Its last 223 tokens are read.",
        },
        _prompt,
    ),
    "response_format": Parameter(
        {"type": "string", "enum": list(RESPONSE_FORMATS), "default": "json"}, _response_format
    ),
    "temperature": Parameter(
        {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0,
            "description": "0 decodes greedily, and anew at higher temperatures where the result looks wrong.",
        },
        _temperature,
    ),
    "language": Parameter(
        {
            "type": "string",
            "minLength": 2,
            "description": "Language spoken: ISO 639-1 code or English name. Left out, it is detected.",
            "example": "en",
        },
        str,
    ),
}

TRANSCRIPTION: Mapping[str, Parameter] = {
    **COMMON,
    "timestamp_granularities": Parameter(
        {
            "type": "array",
            "items": {"type": "string", "enum": ["segment"]},
            "description": "Only with response_format verbose_json.",
        },
        _granularity,
        many=True,
    ),
    "stream": Parameter(
        {"type": "boolean", "enum": [False], "default": False, "description": "Not supported yet."}, _stream
    ),
    "chunking_strategy": Parameter(
        {"type": "string", "enum": ["auto"], "description": "Recordings are cut in pauses."}, _chunking_strategy
    ),
}

PARAMETERS: Mapping[Task, Mapping[str, Parameter]] = {"transcribe": TRANSCRIPTION, "translate": COMMON}

# OpenAI's parameters that ask for more than Whisper gives.
NOT_SUPPORTED = ("include", "keywords", "known_speaker_names", "known_speaker_references", "languages")


def parse_form(
    items: Iterable[tuple[str, str | UploadFile]], options: TranscribeOptions, model: ServedModel
) -> AudioRequest:
    """The request that a form's items make, upon the options that come from elsewhere (task, priority, timeout).

    Raises InvalidRequest, which names the parameter, or ModelNotFound.
    """
    audio, values = _collect(items, PARAMETERS[options.task])
    if audio is None:
        raise _missing("file", "the recording")
    if not audio.size:
        raise _invalid("file", "is empty.")
    if "model" not in values:
        raise _missing("model", f"for instance `{model.name}`")
    model.require(values["model"])
    response_format = values.get("response_format", "json")
    if "timestamp_granularities" in values and response_format != "verbose_json":
        raise _invalid("timestamp_granularities", "needs response_format verbose_json.")
    if options.task == "translate" and model.english_only:
        raise InvalidRequest(
            f"The served model `{model.name}` knows English only and does not translate.", param="model"
        )
    options = replace(
        options,
        language=_resolve_language(values.get("language"), model),
        prompt=values.get("prompt"),
        temperature=values.get("temperature", 0.0),
    )
    return AudioRequest(audio, response_format, options)


def form_schema(task: Task) -> dict[str, object]:
    """OpenAPI's schema of the form."""
    properties: dict[str, object] = {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "The recording, in any common container: FLAC, MP3, MP4, M4A, Ogg, WAV, WebM, …",
        }
    }
    for name, parameter in PARAMETERS[task].items():
        properties[f"{name}[]" if parameter.many else name] = parameter.schema
    return {"type": "object", "properties": properties, "required": ["file", "model"], "additionalProperties": False}


def _collect(
    items: Iterable[tuple[str, str | UploadFile]], parameters: Mapping[str, Parameter]
) -> tuple[UploadFile | None, dict[str, Any]]:
    audio: UploadFile | None = None
    values: dict[str, Any] = {}
    for field, value in items:
        if field == "file":
            if audio is not None:
                raise _duplicate("file")
            if isinstance(value, str):
                raise _invalid("file", "must be an uploaded file: a part of the form that has a filename.")
            audio = value
            continue
        name = _parameter_name(field, parameters)
        if not isinstance(value, str):
            raise _invalid(name, "must be text, not an uploaded file.")
        parameter = parameters[name]
        if parameter.many:
            values.setdefault(name, []).append(parameter.parse(value))
        elif name in values:
            raise _duplicate(name)
        else:
            values[name] = parameter.parse(value)
    return audio, values


def _parameter_name(field: str, parameters: Mapping[str, Parameter]) -> str:
    """The parameter that a field sets. Lists come as ``name``, ``name[]`` or ``name[0]``, objects as ``name[key]``."""
    name = field.partition("[")[0]
    suffix = field[len(name) :]
    if name in parameters:
        if not suffix or (parameters[name].many and re.fullmatch(r"\[\d*\]", suffix)):
            return name
        if name == "chunking_strategy":
            _chunking_strategy(suffix)
    if name in NOT_SUPPORTED:
        raise _not_yet(name, "is not supported by this server.")
    raise InvalidRequest(f"Unknown parameter: `{_shorten(field)}`.", param=_shorten(field), code="unknown_parameter")


def _resolve_language(name: str | None, model: ServedModel) -> str | None:
    if name is None:
        return "en" if model.english_only else None
    code = language_code(name)
    if code in model.languages:
        return code
    if model.english_only and code is not None:
        raise _invalid("language", f"must be en: the served model `{model.name}` knows English only.")
    known = ", ".join(sorted(model.languages))
    raise _invalid("language", f"'{_shorten(name)}' is not known. Known: {known}; or their English names.")


def _missing(param: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"You must provide `{param}`: {hint}.", param=param, code="missing_required_parameter")


def _duplicate(param: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` is given more than once.", param=param, code="duplicate_parameter")
