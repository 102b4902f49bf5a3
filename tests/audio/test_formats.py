"""The set of real files in every format, and of damaged ones, through the sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from serve_app.audio.decode import AudioDecoder
from serve_app.errors import InvalidAudio
from serve_app.settings import AudioSettings

# Seconds that can be decoded of a damaged file, or what is said of one that cannot.
DAMAGED: dict[str, float | str] = {
    "trunc50.mp3": 5.5,
    "trunc50.wav": 5.5,
    "trunc30.flac": 3.1,
    "bitflips.flac": 8.7,
    "mp3_named.wav": 11.0,
    "zero_length_data_field.wav": 11.0,
    "trunc50.m4a": r"index \(moov\) is missing",
    "header_only.wav": "WAV, but cannot be read",
    "zero_bytes.wav": "empty",
    "random_bytes.mp3": "unknown kind",
    "text_file.wav": "is text",
    "png_named.flac": "PNG image",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decoder() -> AsyncIterator[AudioDecoder]:
    async with AudioDecoder(AudioSettings()) as decoder:
        yield decoder


async def seconds(decoder: AudioDecoder, path: Path) -> float:
    with path.open("rb") as file:
        return sum([len(block) async for block in decoder.decode(file)]) / 16_000


@pytest.mark.asyncio(loop_scope="module")
async def test_every_file_decodes_or_says_why_not(
    decoder: AudioDecoder, shared_audio: Path, manifest: list[dict[str, Any]]
) -> None:
    files = [entry for entry in manifest if entry["file"].startswith("formats/")]
    assert len(files) == 39
    for entry in files:
        path = shared_audio / entry["file"]
        expected = DAMAGED[path.name] if entry["category"] == "corrupt" else entry["seconds"]
        if isinstance(expected, str):
            with pytest.raises(InvalidAudio, match=expected):
                await seconds(decoder, path)
        else:
            # Codecs with frames of fixed length end up to 0.2 s later (ADPCM's blocks are the longest).
            assert await seconds(decoder, path) == pytest.approx(expected, abs=0.3), path.name
