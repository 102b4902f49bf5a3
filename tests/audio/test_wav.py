"""Plain WAV files are read as the decoder reads them; all others are left to it."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audio import wav as module
from serve_app.audio.recording import decode
from serve_app.audio.samples import Limits
from serve_app.errors import AudioTooLarge, InvalidAudio
from serve_app.settings import AudioSettings
from tests.audio.make import noise, wav

SETTINGS = AudioSettings()


async def read(source: bytes | io.IOBase, settings: AudioSettings = SETTINGS) -> npt.NDArray[np.int16] | None:
    blocks = await module.plain(source, settings)  # type: ignore[arg-type]
    return None if blocks is None else np.concatenate([block async for block in blocks])


def decoded(data: bytes) -> npt.NDArray[np.int16]:
    """By FFmpeg."""
    return np.concatenate(list(decode(io.BytesIO(data).read, Limits.of(SETTINGS))))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seconds", [0.001, 0.5, 17.3])
async def test_it_is_what_the_decoder_gives(rate: int, channels: int, seconds: float) -> None:
    data = wav(noise(seconds * channels, rate)[: int(seconds * rate) * channels], rate, channels=channels)
    mine, theirs = await read(data), decoded(data)
    assert mine is not None
    assert np.array_equal(mine, theirs)


async def test_a_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    original = noise(20)
    path = tmp_path / "a.wav"
    path.write_bytes(b"before" + wav(original))
    with path.open("rb") as file:
        file.seek(6)
        assert np.array_equal(await read(file), original)


async def test_what_stands_before_and_behind_the_samples_is_passed_over() -> None:
    original = noise(1)
    data = wav(original)
    listed = b"LIST" + struct.pack("<I", 5) + b"INFO!" + b"\0"  # padded to an even length
    data = data[:36] + listed + data[36:] + b"cue " + struct.pack("<I", 4) + bytes(4)
    assert np.array_equal(await read(data), original)
    assert np.array_equal(decoded(data), original)


class Stream(io.BytesIO):
    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"RIFF",
        b"OggS" + bytes(100),
        wav(noise(1).astype(np.int32)),
        wav(noise(1).astype(np.float32), format_tag=3),
        wav(noise(1), format_tag=0xFFFE),
        wav(noise(1), channels=4),
        wav(noise(1), channels=0),
        wav(noise(1), claimed_rate=0),
        wav(noise(1), claimed_bytes=0xFFFFFFFF),  # streamed
        wav(noise(1), claimed_bytes=0),
        wav(noise(1), claimed_bytes=31_999),
        wav(noise(1))[:-2],  # cut off
        wav(noise(1))[:40],
        b"RIFF\0\0\0\0WAVEdata\x04\0\0\0" + bytes(4),
        b"RIFF\0\0\0\0WAVEjunk" + struct.pack("<I", 5000) + bytes(5000) + wav(noise(1))[12:],  # too far behind
        Stream(wav(noise(1))),
    ],
)
async def test_whatever_else_is_left_to_the_decoder(source: bytes | io.BytesIO) -> None:
    assert await module.plain(source, SETTINGS) is None


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (wav(noise(1), claimed_rate=2**31 - 1), {}, AudioTooLarge, "sample rate of 2147483647 Hz"),
        (wav(noise(1), claimed_rate=1), {}, InvalidAudio, "sample rate of 1 Hz"),
        (wav(noise(2)), {"max_seconds": 1.5}, AudioTooLarge, "longer than the limit"),
        (wav(noise(2)), {"max_upload_bytes": 60_000}, AudioTooLarge, "larger than the limit"),
        (wav(noise(2)), {"max_decoded_bytes": 60_000}, AudioTooLarge, "Decoded"),
    ],
)
async def test_caps_hold(data: bytes, settings: dict[str, float], error: type[Exception], message: str) -> None:
    for source in (data, io.BytesIO(data)):
        with pytest.raises(error, match=message):
            await read(source, SETTINGS.model_copy(update=settings))


async def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(noise(20)))
    with path.open("r+b") as file:
        blocks = await module.plain(file, SETTINGS)
        assert blocks is not None
        await anext(blocks)
        file.truncate(100_000)
        with pytest.raises(InvalidAudio, match="shorter"):
            _ = [block async for block in blocks]


CHUNKS = st.lists(
    st.tuples(st.sampled_from([b"fmt ", b"data", b"LIST", b"\0\0\0\0"]), st.integers(0, 2**32 - 1), st.binary()),
    max_size=4,
)


@given(chunks=CHUNKS, size=st.integers(0, 10_000), cut=st.integers(0, 200))
def test_no_header_makes_it_read_outside_of_the_file(
    chunks: list[tuple[bytes, int, bytes]], size: int, cut: int
) -> None:
    body = b"".join(name + struct.pack("<I", length) + content for name, length, content in chunks)
    head = (b"RIFF\0\0\0\0WAVE" + body)[: max(12, cut)]
    found = module.layout(head, size)
    if found is not None:
        assert found.channels in (1, 2)
        assert found.frames > 0
        assert found.begin + found.frames * found.frame_bytes <= size


@given(channels=st.integers(1, 2), rate=st.integers(1, 2**32 - 1), frames=st.integers(1, 50), behind=st.binary())
def test_the_layout_is_what_was_written(channels: int, rate: int, frames: int, behind: bytes) -> None:
    data = wav(np.zeros(frames * channels, np.int16), rate, channels=channels) + behind
    assert module.layout(data, len(data)) == module.Layout(channels, rate, 44, frames)
