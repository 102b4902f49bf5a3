"""Encoded bytes → samples, with FFmpeg through PyAV, under caps that apply while decoding.

This is what runs inside the sandbox. It knows nothing of processes, and can be called without one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import av
import av.error
import av.logging
import numpy as np
import numpy.typing as npt
from av.audio.fifo import AudioFifo
from av.stream import Discard

from serve_app.audio import containers
from serve_app.audio.samples import Int16, Limits, Resampler
from serve_app.errors import AudioTooLarge, InvalidAudio

# Prints nothing, but has exceptions carry FFmpeg's last words.
av.logging.set_level(av.logging.PANIC)

# FFmpeg asks for so much at a time; it also bounds how far back a container read as a stream can look.
READ_BYTES = 1 << 18
HEAD_BYTES = 64
# Damage in the middle of a recording is skipped, up to about 25 s of MP3; beyond that the file is taken for noise.
MAX_BAD_PACKETS = 1000


class Input:
    """The upload as the file that FFmpeg reads: ``read_some(n)`` gives at least 1 and at most n bytes, b"" at the end.

    Containers that may keep their index at the end can seek, for which all bytes read are kept (at most
    ``max_upload_bytes``); the others see a stream of which nothing is kept.
    """

    def __init__(self, read_some: Callable[[int], bytes], limits: Limits):
        self._read_some = read_some
        self._limits = limits
        self._kept = bytearray()
        self._position = 0
        self._received = 0
        while len(self._kept) < HEAD_BYTES and self._fetch():
            pass
        self.head = bytes(self._kept[:HEAD_BYTES])
        self._seekable = containers.needs_seeking(self.head)

    def seekable(self) -> bool:
        return self._seekable

    def read(self, size: int) -> bytes:
        if self._seekable:
            while len(self._kept) <= self._position and self._fetch():
                pass
            data = bytes(self._kept[self._position : self._position + size])
        else:
            if not self._kept:
                self._fetch()
            data = bytes(self._kept[:size])
            del self._kept[:size]
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            while self._fetch():
                pass
            offset += len(self._kept)
        if offset < 0:
            return -errno.EINVAL  # FFmpeg's way of saying so
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def _fetch(self) -> bool:
        data = self._read_some(READ_BYTES)
        self._received += len(data)
        self._limits.check_upload(self._received)
        self._kept += data
        return bool(data)


def decode(read_some: Callable[[int], bytes], limits: Limits) -> Iterator[Int16]:
    """Yields the recording at 16 kHz, mono, int16, in blocks of about a second.

    What can be decoded of a damaged file is. Raises InvalidAudio where that is nothing, and AudioTooLarge as soon as a
    cap is passed, or at once where the container tells.
    """
    source = Input(read_some, limits)
    if not source.head:
        raise InvalidAudio("The file is empty.")
    try:
        with _open(source) as container:
            yield from _decode(container, limits)
    except MemoryError:
        raise AudioTooLarge(
            f"Decoding the recording takes more than the limit of {limits.worker_memory_bytes / 2**20:g} MiB of memory."
        ) from None
    except av.error.FFmpegError as error:
        raise InvalidAudio(f"The audio cannot be decoded: {_reason(error)}.") from None


def _open(source: Input) -> Any:
    try:
        return av.open(
            source,
            mode="r",
            # Read by FFmpeg only. No protocol: the upload is all there is, whatever it names.
            container_options={
                "format_whitelist": ",".join(containers.DEMUXERS),
                "codec_whitelist": ",".join(sorted(containers.DECODERS)),
                "protocol_whitelist": "none",
                # Looking for DTS hidden in WAV would cost more than decoding a short clip.
                "max_probe_packets": "1",
                # Of WAV's packets, bytes: each costs a trip through Python, and by default they are 64 ms of speech.
                "max_size": "32768",
            },
            metadata_errors="ignore",
            buffer_size=READ_BYTES,
        )
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        known = containers.sniff(source.head)
        if known is None:
            what = containers.describe(source.head)
            raise InvalidAudio(f"The file is {what}, not audio that is supported ({containers.CONTAINERS}).") from None
        title = containers.TITLES[known]
        reason = _reason(error)
        if known == "mov" and "moov" in reason:
            reason = "its index (moov) is missing, so it was probably cut short"
        raise InvalidAudio(f"The file looks like {title}, but cannot be read: {reason}.") from None


def _decode(container: Any, limits: Limits) -> Iterator[Int16]:
    name = container.format.name.split(",")[0]
    title = containers.TITLES[name]
    stream = container.streams.best("audio")
    if stream is None:
        raise InvalidAudio(f"The file ({title}) has no audio stream.")
    codec = stream.codec_context
    if codec is None or codec.name not in containers.DECODERS:
        raise InvalidAudio(f"The file ({title}) holds audio in an encoding that is not supported.")
    limits.check_format(codec.channels, codec.sample_rate)
    if container.duration is not None and name in containers.LENGTH_TRUSTED:
        limits.check_seconds(container.duration / av.time_base)
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    codec.thread_count = 1

    resampler = Resampler()
    decoded = False
    for frame in _second_by_second(_within(limits, _frames(container, stream))):
        decoded = True
        yield from resampler.push(_channels(frame), frame.sample_rate)
    if not decoded:
        raise InvalidAudio(f"The file ({title}) holds no audio that can be decoded; it is empty or damaged.")
    yield from resampler.finish()


def _within(limits: Limits, frames: Iterator[Any]) -> Iterator[Any]:
    """The frames, as long as they keep the limits: the stream may turn out other than its header said."""
    seconds = 0.0
    decoded_bytes = 0
    for frame in frames:
        channels = frame.layout.nb_channels
        limits.check_format(channels, frame.sample_rate)
        seconds += frame.samples / frame.sample_rate
        limits.check_seconds(seconds)
        decoded_bytes += frame.samples * channels * frame.format.bytes
        limits.check_decoded(decoded_bytes)
        yield frame


def _second_by_second(frames: Iterator[Any]) -> Iterator[Any]:
    """The same samples in frames of a second, since a call of numpy's costs more than a codec's 26 ms are worth."""
    fifo, kind = AudioFifo(), None
    for frame in frames:
        rate = frame.sample_rate
        if kind != (kind := (rate, frame.layout.name, frame.format.name)):
            if rest := fifo.read(0, partial=True):
                yield rest
            fifo = AudioFifo()
        frame.pts = None  # gaps are not filled
        fifo.write(frame)
        while whole := fifo.read(rate):
            yield whole
    if rest := fifo.read(0, partial=True):
        yield rest


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames. A packet that cannot be decoded is skipped; where the container breaks off, so do they."""
    bad = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except MemoryError:
            raise
        except av.error.FFmpegError:
            packet = None
        try:
            frames = stream.codec_context.decode(packet)
        except MemoryError:
            raise
        except av.error.EOFError:
            frames = []
        except av.error.FFmpegError:
            frames = []
            bad += 1
            if bad > MAX_BAD_PACKETS:
                raise InvalidAudio(f"The audio is damaged: {bad} packets in a row cannot be decoded.") from None
        else:
            bad = 0
        yield from frames
        if packet is None:
            return


def _channels(frame: Any) -> npt.NDArray[Any]:
    """[channels, n], whatever the frame's layout in memory."""
    samples: npt.NDArray[Any] = frame.to_ndarray()
    if frame.format.is_planar:
        return samples
    return np.ascontiguousarray(samples.reshape(-1, frame.layout.nb_channels).T)


def _reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's own last words on it, else its name for the error."""
    text = error.log[-1] if error.log else error.strerror
    return "".join(character if character.isprintable() else " " for character in str(text)).strip(" .!")[:200]
