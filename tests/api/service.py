"""What the API stands in front of here: it gives one transcript, or fails, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import BinaryIO

from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Segment, Transcript

TRANSCRIPT = Transcript(
    task="transcribe",
    language="en",
    duration=61.25,
    text="So it begins. R&D costs < 3 € a day.",
    segments=[
        Segment(0, 0, 0.0, 59.9996, " So it begins.", [50364, 407, 309, 7338, 13, 50414], 0.0, -0.25, 1.1, 0.01),
        Segment(1, 3000, 59.9996, 61.239999999, " R&D costs < 3 € a day.", [50364, 497, 50414], 0.2, -0.5, 1.2, 0.02),
    ],
)


@dataclass
class FixedService:
    transcript: Transcript = TRANSCRIPT
    error: BaseException | None = None
    model_name: str = "base"
    created: int = 1_700_000_000
    languages: Collection[str] = ("en", "de", "fr", "ja", "jw", "no", "yue")
    stages: dict[str, bool] = field(default_factory=lambda: {"features": True, "encoder": True, "decoder": True})
    hangs: bool = False
    asked: list[tuple[bytes, TranscribeOptions]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def transcribe(self, audio: BinaryIO, options: TranscribeOptions) -> Transcript:
        self.asked.append((audio.read(), options))
        self.started.set()
        if self.error is not None:
            raise self.error
        if self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return self.transcript

    async def ready(self) -> dict[str, bool]:
        return self.stages

    @property
    def options(self) -> TranscribeOptions:
        """What the last request asked for."""
        return self.asked[-1][1]
