"""Recordings that the tests make for themselves."""

from __future__ import annotations

import io
import struct
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0, amplitude: float = 0.5) -> npt.NDArray[np.int16]:
    """int16 [n]"""
    time = np.arange(round(seconds * rate)) / rate
    return np.rint(amplitude * 32767 * np.sin(2 * np.pi * hertz * time)).astype(np.int16)


def noise(seconds: float, rate: int = 16_000) -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(-20_000, 20_000, round(seconds * rate)).astype(np.int16)


def wav(
    samples: npt.NDArray[Any],
    rate: int = 16_000,
    *,
    channels: int = 1,
    claimed_rate: int | None = None,
    claimed_bytes: int | None = None,
    format_tag: int = 1,
) -> bytes:
    """A WAV file of interleaved samples, whose header may say what is not so."""
    data = samples.tobytes()
    width = samples.dtype.itemsize
    said = rate if claimed_rate is None else claimed_rate
    layout = struct.pack(
        "<HHIIHH", format_tag, channels, said, (said * channels * width) % 2**32, channels * width, 8 * width
    )
    size = len(data) if claimed_bytes is None else claimed_bytes
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(len(body), 2**32 - 1)) + body


def encode(
    samples: npt.NDArray[np.int16], rate: int, container: str, codec: str, options: dict[str, str] | None = None
) -> bytes:
    """Mono samples in a container that FFmpeg writes."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container, options=options or {}) as output:
            stream: Any = output.add_stream(codec, rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            for packet in stream.encode(frame):
                output.mux(packet)
            for packet in stream.encode(None):
                output.mux(packet)
        return Path(file.name).read_bytes()


def film(sound: npt.NDArray[np.int16] | None = None) -> bytes:
    """An MP4 with a second of pictures, and sound at 16 kHz if there is any."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        pictures: Any = output.add_stream("libx264", rate=10, width=64, height=64, pix_fmt="yuv420p")
        voice: Any = output.add_stream("aac", rate=16_000, layout="mono") if sound is not None else None
        for _ in range(10):
            for packet in pictures.encode(av.VideoFrame(64, 64, "yuv420p")):
                output.mux(packet)
        for packet in pictures.encode(None):
            output.mux(packet)
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            for packet in [*voice.encode(frame), *voice.encode(None)]:
                output.mux(packet)
    return file.getvalue()


def long_opus(seconds: float) -> bytes:
    """Ogg Opus of any length, fast: one second is encoded, and its packets are written again and again."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as output:
        stream: Any = output.add_stream(
            "libopus", rate=48_000, layout="mono", options={"frame_duration": "120", "b": "6000"}
        )
        frame = av.AudioFrame.from_ndarray(noise(1.2, 48_000)[None] // 8, format="s16", layout="mono")
        frame.sample_rate = 48_000
        payloads = [bytes(packet) for packet in [*stream.encode(frame), *stream.encode(None)]]
        for index in range(round(seconds / 0.12)):
            packet = av.Packet(payloads[index % len(payloads)])
            packet.stream = stream
            packet.time_base = Fraction(1, 48_000)
            packet.pts = packet.dts = index * 5760
            packet.duration = 5760
            output.mux(packet)
    return file.getvalue()
