"""What the API answers with, for the responses and for /docs alike. Source: OpenAI's API reference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Sums of window offsets and timestamps carry floating-point dust.
Seconds = Annotated[float, AfterValidator(lambda seconds: round(seconds, 3)), Field(description="seconds")]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(Schema):
    type: Literal["duration"]
    seconds: int = Field(description="length of the recording in started seconds")


class Transcription(Schema):
    """``json``. A translation has no usage."""

    text: str
    usage: Usage | None = None


class VerboseSegment(Schema):
    id: int
    seek: int = Field(description="start of the segment's window, in frames of 10 ms")
    start: Seconds
    end: Seconds
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseTranscription(Schema):
    """``verbose_json``. A translation has no usage."""

    task: str
    language: str = Field(description="English name in lower case; of a translation always english")
    duration: Seconds
    text: str
    segments: list[VerboseSegment]
    usage: Usage | None = None


class Model(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds")
    owned_by: str = "whisper-serve"


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Schema):
    status: Literal["ok"] = "ok"


class Readiness(Schema):
    status: Literal["ready"] = "ready"
    stages: dict[str, bool]


class ErrorObject(Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Schema):
    error: ErrorObject
