"""Uploads that mean harm: small files that claim, or become, more than a server should take, or that name others."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from functools import cache

import av
import numpy as np

HOUR_S = 3600
OPUS_RATE = 48_000
OPUS_BITS_PER_SECOND = 6_000
OPUS_FRAME_MS = 60
OGG_PAGE_US = 15_000_000  # the fewest pages, so that nine hours stay under 25 MB
AAC_RATE = 8_000
AAC_FRAME_SAMPLES = 1024
PCM = 1


@cache
def opus(seconds: int, pattern_s: int = 60) -> bytes:
    """Noise in Ogg Opus at 6 kbit/s: nine hours are 25 MB, and 5.7 GB of samples at 48 kHz.

    Only ``pattern_s`` seconds are encoded; their packets are repeated, because nine hours of encoding take minutes.
    """
    packets, header = _opus_packets(pattern_s)
    target = io.BytesIO()
    samples = OPUS_RATE * OPUS_FRAME_MS // 1000
    with av.open(target, "w", format="ogg", options={"page_duration": str(OGG_PAGE_US)}) as container:
        stream = container.add_stream("libopus", rate=OPUS_RATE, layout="mono")
        stream.codec_context.extradata = header
        for i in range(seconds * 1000 // OPUS_FRAME_MS):
            packet = av.Packet(packets[i % len(packets)])
            packet.stream = stream
            packet.time_base = Fraction(1, OPUS_RATE)
            packet.pts = packet.dts = i * samples
            packet.duration = samples
            container.mux(packet)
    return target.getvalue()


@cache
def aac(seconds: int) -> bytes:
    """Silence as bare AAC frames (ADTS) at 8 kHz: no header tells the length, and nine hours are 3 MB."""
    target = io.BytesIO()
    with av.open(target, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=AAC_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 10 * AAC_RATE), np.float32), format="fltp", layout="mono")
        frame.sample_rate = AAC_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    frame_bytes = _adts_frames(target.getvalue())[-1]  # the first also holds the encoder's name
    return frame_bytes * (seconds * AAC_RATE // AAC_FRAME_SAMPLES)


def wav(
    sample_rate: int = 16_000,
    channels: int = 1,
    seconds: float = 1.0,
    real_rate: int = 16_000,
    data_bytes: int | None = None,
) -> bytes:
    """16-bit PCM of a quiet tone. The header says ``sample_rate`` and, if given, ``data_bytes``; the file holds
    ``seconds`` at ``real_rate``."""
    tone = 1000 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * real_rate)) / real_rate)
    data = np.repeat(tone.astype("<i2"), channels).tobytes()
    claimed = len(data) if data_bytes is None else data_bytes
    block = 2 * channels
    byte_rate = min(sample_rate * block, 2**32 - 1)
    form = struct.pack("<HHIIHH", PCM, channels, sample_rate, byte_rate, block, 16)
    riff = b"RIFF" + struct.pack("<I", min(claimed + 36, 2**32 - 1))
    return riff + b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", claimed) + data


def hls_playlist(*targets: str) -> bytes:
    """An HLS playlist whose segments are the targets, which FFmpeg would open."""
    segments = "".join(f"#EXTINF:10.0,\n{target}\n" for target in targets)
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n{segments}#EXT-X-ENDLIST\n".encode()


def concat_list(*targets: str) -> bytes:
    """A list for FFmpeg's concat demuxer."""
    return "".join(["ffconcat version 1.0\n", *(f"file '{target}'\n" for target in targets)]).encode()


def dash_manifest(target: str) -> bytes:
    """A DASH manifest whose one representation is the target."""
    return (
        '<?xml version="1.0"?>\n'
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT10S" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="audio/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>\n"
    ).encode()


def _opus_packets(seconds: int) -> tuple[list[bytes], bytes]:
    """Packets of noise, and the header that describes them."""
    codec = av.CodecContext.create("libopus", "w")
    assert isinstance(codec, av.AudioCodecContext)
    codec.sample_rate, codec.layout, codec.format = OPUS_RATE, "mono", "s16"
    codec.bit_rate = OPUS_BITS_PER_SECOND
    codec.options = {"vbr": "off", "frame_duration": str(OPUS_FRAME_MS), "compression_level": "0"}
    codec.time_base = Fraction(1, OPUS_RATE)
    codec.open()
    noise = np.random.default_rng(0).normal(0, 1000, (1, seconds * OPUS_RATE)).astype(np.int16)
    size = codec.frame_size
    packets: list[bytes] = []
    for start in range(0, noise.shape[1], size):
        samples = np.ascontiguousarray(noise[:, start : start + size])
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = OPUS_RATE
        frame.pts = start
        packets.extend(bytes(packet) for packet in codec.encode(frame))
    return packets, codec.extradata or b""


def _adts_frames(content: bytes) -> list[bytes]:
    frames: list[bytes] = []
    while content:
        # ISO/IEC 13818-7, 6.2.1: 13 bits from the 31st on are the frame's length, header included.
        length = int.from_bytes(content[3:6], "big") >> 5 & 0x1FFF
        frames.append(content[:length])
        content = content[length:]
    return frames
