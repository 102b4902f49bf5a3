"""Blocks of samples → windows, with voice activity computed beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import numpy as np

from serve_app.audio.samples import FRAME_SAMPLES, Float32, Int16
from serve_app.audio.vad import SpeechDetector
from serve_app.audio.windows import Window, WindowCutter
from serve_app.settings import VadSettings

PORTION_SAMPLES = 157 * FRAME_SAMPLES
"""Five seconds: the network costs twice as much in portions of one, and longer ones gain nothing. All of one length, so
that those of different recordings can be computed together; thirty seconds are six."""


class Windows:
    """The windows of one recording, in order, as they are complete: ``async for window in windows``, once.

    blocks: int16 [n] at 16 kHz, as ``AudioDecoder.decode`` and ``pcm`` give them; their errors pass through.

    ``duration`` is how many seconds of the recording were taken so far: all of it after the last window.
    """

    def __init__(self, blocks: AsyncGenerator[Int16, None], detector: SpeechDetector, settings: VadSettings):
        self._blocks = blocks
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
        incomplete: Float32 = np.zeros(0, np.float32)
        async with aclosing(self._blocks):
            async for portion in _portions(self._blocks):
                last = len(portion) < PORTION_SAMPLES  # a frame by itself would cost as much as twenty of a portion
                probabilities = await asyncio.wrap_future(self._stream.push(portion, last=last))
                whole = len(portion) // FRAME_SAMPLES
                incomplete = probabilities[whole:]
                for window in self._cutter.push(portion, probabilities[:whole]):
                    yield window
            for window in self._cutter.finish(incomplete):
                yield window


async def _portions(blocks: AsyncIterator[Int16]) -> AsyncIterator[Int16]:
    """Of ``PORTION_SAMPLES`` each, but for the last."""
    waiting: list[Int16] = []
    async for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= PORTION_SAMPLES:
            joined = np.concatenate(waiting)
            whole = len(joined) // PORTION_SAMPLES * PORTION_SAMPLES
            for first in range(0, whole, PORTION_SAMPLES):
                yield joined[first : first + PORTION_SAMPLES]
            waiting = [joined[whole:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)
