"""Blocks of samples → windows, with voice activity computed beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import numpy as np

from serve_app.audio.samples import SAMPLE_RATE, Int16
from serve_app.audio.vad import SpeechDetector
from serve_app.audio.windows import Window, WindowCutter
from serve_app.settings import VadSettings

# The network costs twice as much in portions of a second as in portions of five; more than that gains nothing.
PORTION_SAMPLES = 5 * SAMPLE_RATE


class Windows:
    """The windows of one recording, in order, as they are complete: ``async for window in windows``, once.

    blocks: int16 [n] at 16 kHz, as ``AudioDecoder.decode`` and ``pcm`` give them; their errors pass through.

    ``duration`` is how many seconds of the recording were taken so far: all of it after the last window.
    """

    def __init__(self, blocks: AsyncGenerator[Int16, None], detector: SpeechDetector, settings: VadSettings):
        self._blocks = blocks
        self._threads = detector.threads
        self._stream = detector.stream()
        self._cutter = WindowCutter(settings)
        self._iterator = self._iterate()

    @property
    def duration(self) -> float:
        return self._cutter.duration

    def __aiter__(self) -> AsyncIterator[Window]:
        return self._iterator

    async def aclose(self) -> None:
        """Ends it early, and with it the decoding of the recording."""
        await self._iterator.aclose()
        await self._blocks.aclose()

    async def _iterate(self) -> AsyncGenerator[Window, None]:
        loop = asyncio.get_running_loop()
        async with aclosing(self._blocks):
            async for portion in _portions(self._blocks):
                for window in await loop.run_in_executor(self._threads, self._push, portion):
                    yield window
            for window in await loop.run_in_executor(self._threads, self._finish):
                yield window

    def _push(self, samples: Int16) -> list[Window]:
        return self._cutter.push(samples, self._stream.push(samples))

    def _finish(self) -> list[Window]:
        return self._cutter.finish(self._stream.flush())


async def _portions(blocks: AsyncIterator[Int16]) -> AsyncIterator[Int16]:
    waiting: list[Int16] = []
    async for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= PORTION_SAMPLES:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
