"""What the HTTP surface needs of whatever transcribes behind it."""

from __future__ import annotations

from collections.abc import Collection
from typing import BinaryIO, Protocol

from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript


class Service(Protocol):
    @property
    def model_name(self) -> str:
        """The served model, as ``GET /v1/models`` lists it."""
        ...

    @property
    def created(self) -> int:
        """When the model was loaded, Unix seconds."""
        ...

    @property
    def languages(self) -> Collection[str]:
        """Whisper's codes of the languages that the model knows. ``{"en"}`` alone is an English-only model."""
        ...

    async def transcribe(self, audio: BinaryIO, options: TranscribeOptions) -> Transcript:
        """Transcribe a recording, read from its start. ``audio`` is closed once this returns.

        Raises what ``serve_app.errors`` holds. Cancelled when the client leaves.
        """
        ...

    async def ready(self) -> dict[str, bool]:
        """By stage: is a replica of it up?"""
        ...
