"""Errors that a user of the service meets. Each knows its HTTP status and OpenAI's error type; every boundary raises
one of these, and the API turns it into OpenAI's error object."""

from __future__ import annotations


class ServiceError(Exception):
    """Base of all errors with a meaning for the caller. The message is for a person who sent the request."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(cls: type[ServiceError], message: str, state: dict[str, object]) -> ServiceError:
    """Exceptions cross processes by pickle, which by itself would lose the keyword arguments."""
    error = cls(message)
    error.__dict__.update(state)
    return error


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request_error"


class AuthenticationFailed(ServiceError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class InvalidAudio(InvalidRequest):
    """The upload is not audio that can be decoded: unknown container, damaged, without an audio stream."""

    code = "invalid_audio"


class AudioTooLarge(ServiceError):
    """A cap was passed: bytes, seconds, decoded samples, channels or sample rate."""

    status = 413
    type = "invalid_request_error"
    code = "audio_too_large"


class Overloaded(ServiceError):
    """The bounded queues are full. ``retry_after_s`` estimates when there will be room."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServiceError):
    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class TranscriptionFailed(ServiceError):
    """A window could not be transcribed although it was tried on several replicas."""

    status = 500
    type = "server_error"
    code = "transcription_failed"
