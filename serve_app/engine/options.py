"""What a caller may ask of a transcription, checked once where it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from serve_app.errors import InvalidRequest

Task = Literal["transcribe", "translate"]
Priority = Literal["interactive", "normal", "batch"]


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """How one recording is to be transcribed.

    language: Whisper's code (``"en"``), or None to detect it in the first window with speech.
    prompt: text that precedes the recording; it steers spelling and style in every window.
    temperature: 0 decodes greedily and falls back to higher temperatures where the result looks wrong (see
        ``engine.fallback``); above 0 samples at just that temperature.
    timestamps: decode with timestamp tokens, so that segments carry times within their window.
    timeout_s: seconds from arrival until the request is given up; None takes the server's setting.
    """

    task: Task = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperature: float = 0.0
    timestamps: bool = True
    priority: Priority = "normal"
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what no transcription can do, whichever way it came."""
        if self.task not in get_args(Task):
            raise InvalidRequest(f"task must be one of {', '.join(get_args(Task))}, not {self.task!r}", param="task")
        if self.priority not in get_args(Priority):
            choices = ", ".join(get_args(Priority))
            raise InvalidRequest(f"priority must be one of {choices}, not {self.priority!r}", param="priority")
        if not 0 <= self.temperature <= 1:
            raise InvalidRequest(f"temperature must be from 0 to 1, not {self.temperature}", param="temperature")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InvalidRequest(f"timeout_s must be above 0, not {self.timeout_s}", param="timeout_s")

    def decoding(self, language: str | None, seed: int) -> DecodeOptions:
        """How one of the recording's windows is decoded, once its language is known or left to detect."""
        temperatures = FALLBACK_TEMPERATURES if self.temperature == 0 else (self.temperature,)
        return DecodeOptions(self.task, language, self.prompt, temperatures, self.timestamps, seed)


# openai-whisper's: greedy first, then sampling ever more freely where the result fails its checks
FALLBACK_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How one window is decoded. temperatures: tried in turn until a result passes ``engine.fallback``. seed: of the
    sampling at temperatures above 0, so that a window decoded again on another replica gives the same text."""

    task: Task = "transcribe"
    language: str | None = None
    prompt: str | None = None
    temperatures: tuple[float, ...] = (0.0,)
    timestamps: bool = True
    seed: int = 0
