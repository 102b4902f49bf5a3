"""Samples of any kind → what Whisper takes: 16 kHz, mono, int16, in blocks of a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import soxr

from serve_app.errors import AudioTooLarge, InvalidAudio, InvalidRequest

if TYPE_CHECKING:  # pydantic is not for the process that decodes
    from serve_app.settings import AudioSettings

SAMPLE_RATE = 16_000
INT16_SCALE = 32_768
FRAME_SAMPLES = 512  # 32 ms: what voice activity judges at a time

Int16 = npt.NDArray[np.int16]
Float32 = npt.NDArray[np.float32]

# Float samples lie in [-1, 1]; mixing and resampling may pass that a little. Far beyond it are integers cast to float.
MAX_FLOAT_PEAK = 8.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of ``AudioSettings``, without pydantic."""

    max_upload_bytes: int
    max_seconds: float
    max_channels: int
    min_sample_rate: int
    max_sample_rate: int
    max_decoded_bytes: int
    worker_memory_bytes: int
    worker_cpu_seconds: float

    @classmethod
    def of(cls, settings: AudioSettings) -> Self:
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def check_upload(self, size: int) -> None:
        if size > self.max_upload_bytes:
            raise AudioTooLarge(f"The file is larger than the limit of {self.max_upload_bytes / 2**20:g} MiB.")

    def check_format(self, channels: int, sample_rate: int) -> None:
        if channels < 1:
            raise InvalidAudio("The audio has no channels.")
        if channels > self.max_channels:
            raise AudioTooLarge(f"The audio has {channels} channels; the limit is {self.max_channels}.")
        if sample_rate < self.min_sample_rate:
            raise InvalidAudio(f"A sample rate of {sample_rate} Hz; the lowest taken is {self.min_sample_rate} Hz.")
        if sample_rate > self.max_sample_rate:
            raise AudioTooLarge(f"A sample rate of {sample_rate} Hz; the limit is {self.max_sample_rate} Hz.")

    def check_seconds(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise AudioTooLarge(f"The recording is longer than the limit of {_duration(self.max_seconds)}.")

    def check_decoded(self, size: int) -> None:
        if size > self.max_decoded_bytes:
            raise AudioTooLarge(f"Decoded, the recording is larger than {self.max_decoded_bytes / 2**20:g} MiB.")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:g} hours" if seconds >= 3600 else f"{seconds:g} seconds"


def to_mono(samples: npt.NDArray[Any]) -> Float32:
    """The mean of the channels, [channels, n] → float32 [n] in [-1, 1]; integers are scaled by their type's range."""
    mono: Float32 = samples.mean(axis=0, dtype=np.float32) if len(samples) > 1 else samples[0].astype(np.float32)
    if samples.dtype == np.uint8:
        mono -= 128
        mono /= 128
    elif np.issubdtype(samples.dtype, np.signedinteger):
        mono *= np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
    return np.nan_to_num(mono, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)


class Resampler:
    """A stream of samples at any rate → blocks of one channel at 16 kHz. The rate may change on the way, as it does in
    chained Ogg. One channel of int16 at 16 kHz passes as it is."""

    def __init__(self) -> None:
        self._rate = SAMPLE_RATE
        self._stream: soxr.ResampleStream | None = None

    def push(self, samples: npt.NDArray[Any], rate: int) -> Iterator[Int16]:
        """Takes [channels, n] at ``rate`` Hz, of a type that ``to_mono`` takes, yields int16 [at most about 16000]."""
        if rate != self._rate:
            yield from self.finish()
            self._rate = rate
            self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        if self._stream is None and len(samples) == 1 and samples.dtype == np.int16:
            yield from (samples[0, start : start + rate] for start in range(0, samples.shape[1], rate))
            return
        mono = to_mono(samples)
        for start in range(0, len(mono), rate):
            part = mono[start : start + rate]
            yield from _quantised(part if self._stream is None else self._stream.resample_chunk(part))

    def finish(self) -> Iterator[Int16]:
        """Yields what the filter still holds."""
        if self._stream is not None:
            yield from _quantised(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))


def _quantised(mono: Float32) -> Iterator[Int16]:
    if len(mono):
        yield np.clip(np.rint(mono * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


def pcm(samples: npt.NDArray[Any], sample_rate: int, settings: AudioSettings) -> AsyncGenerator[Int16, None]:
    """Blocks of a recording that a Python caller holds as an array.

    samples: [n] or, as soundfile reads them, [n, channels]; float16/32/64 in [-1, 1] or int16.
    sample_rate: Hz.

    Raises at once InvalidRequest for a wrong type, shape or rate and AudioTooLarge for a cap passed; while iterating,
    InvalidRequest for samples that are not finite or far outside [-1, 1].
    """
    if not isinstance(samples, np.ndarray):
        raise InvalidRequest(f"samples must be a numpy array, not {type(samples).__name__}")
    if samples.dtype not in (np.float16, np.float32, np.float64, np.int16):
        raise InvalidRequest(f"samples must be float16, float32, float64 or int16, not {samples.dtype}")
    if samples.ndim not in (1, 2):
        raise InvalidRequest(f"samples must be [n] or [n, channels], not of shape {list(samples.shape)}")
    if not isinstance(sample_rate, int | np.integer) or isinstance(sample_rate, bool):
        raise InvalidRequest(f"sample_rate must be a whole number of Hz, not {sample_rate!r}")
    if samples.size == 0:
        raise InvalidRequest("samples is empty")
    frames = samples.reshape(len(samples), -1)
    limits = Limits.of(settings)
    limits.check_format(frames.shape[1], int(sample_rate))
    limits.check_seconds(len(frames) / sample_rate)
    return blocks_of(lambda start, count: frames[start : start + count], len(frames), int(sample_rate))


async def blocks_of(
    read: Callable[[int, int], npt.NDArray[Any]], frames: int, rate: int
) -> AsyncGenerator[Int16, None]:
    """Blocks of a recording whose samples lie ready. read: from a frame on, so many frames [count, channels], in a
    thread; they are ``frames`` in all.

    Raises InvalidRequest for samples that are not finite or far outside [-1, 1]."""
    resampler = Resampler()
    most = 8 * rate  # per trip to the thread

    def convert(start: int) -> list[Int16]:
        part = read(start, min(most, frames - start))
        if part.dtype != np.int16:
            peak = np.abs(part).max()
            if not np.isfinite(peak):
                raise InvalidRequest("samples contain NaN or infinity")
            if peak > MAX_FLOAT_PEAK:
                raise InvalidRequest(f"float samples must lie in [-1, 1]; found {peak:g}")
        blocks = list(resampler.push(part.T, rate))
        if start + most >= frames:
            blocks += resampler.finish()
        return blocks

    for start in range(0, frames, most):
        for block in await asyncio.to_thread(convert, start):
            yield block
