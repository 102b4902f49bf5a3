from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from serve_app.audio.decode import AudioDecoder
from serve_app.audio.pipeline import Windows
from serve_app.audio.samples import pcm
from serve_app.audio.vad import SpeechDetector
from serve_app.errors import InvalidAudio, InvalidRequest
from serve_app.settings import AudioSettings, VadSettings
from tests.audio.make import noise
from tests.audio.processes import decoders

VAD = VadSettings()
AUDIO = AudioSettings()


@pytest.fixture(scope="module")
def detector() -> SpeechDetector:
    return SpeechDetector()


async def test_a_short_recording_is_one_window(detector: SpeechDetector, shared_audio: Path) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with (shared_audio / "formats" / "jfk-mp3_44k_stereo.mp3").open("rb") as file:
            stream = Windows(decoder.decode(file), detector, VAD)
            [window] = [window async for window in stream]
    assert stream.duration == pytest.approx(11.0, abs=0.001)
    assert len(window.samples) == 176_000
    assert 6 < window.speech_seconds < 10


async def test_a_40_s_pause_is_not_decoded(detector: SpeechDetector, shared_audio: Path) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with (shared_audio / "en_long" / "speech-pause40s-speech.flac").open("rb") as file:
            stream = Windows(decoder.decode(file), detector, VAD)
            first, second = [window async for window in stream]
    assert stream.duration == pytest.approx(96.71, abs=0.01)
    assert first.start == pytest.approx(8.1, abs=0.4)
    assert first.start + len(first.samples) / 16_000 < 19.5
    assert second.start == pytest.approx(58.4, abs=0.4)
    assert len(second.samples) < 4.5 * 16_000


async def test_a_long_reading_is_cut_in_its_pauses(detector: SpeechDetector, shared_audio: Path) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with (shared_audio / "en_long" / "lj001-3min.flac").open("rb") as file:
            found = [window async for window in Windows(decoder.decode(file), detector, VAD)]
    assert 7 <= len(found) <= 9
    for window in found[:-1]:  # quiet at the cut, compared with the window
        edge = window.samples[-1600:].astype(float)
        assert np.abs(edge).mean() < 0.3 * np.abs(window.samples.astype(float)).mean()


@pytest.mark.parametrize("name", ["silence_60s.flac", "white_30s.flac", "pink_20s.flac", "hum50_30s.flac"])
async def test_silence_and_noise_have_no_window(detector: SpeechDetector, shared_audio: Path, name: str) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with (shared_audio / "nospeech" / name).open("rb") as file:
            stream = Windows(decoder.decode(file), detector, VAD)
            assert [window async for window in stream] == []
    assert stream.duration >= 20


async def test_arrays_go_the_same_way(detector: SpeechDetector) -> None:
    stream = Windows(pcm(noise(3).astype(np.float32) / 32768, 16_000, AUDIO), detector, VAD)
    assert [window async for window in stream] == []
    assert stream.duration == 3


async def test_errors_pass_through(detector: SpeechDetector) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with pytest.raises(InvalidAudio, match="text"):
            async for _ in Windows(decoder.decode(b"not audio at all, only text"), detector, VAD):
                pass
    samples = np.full(20 * 16_000, np.nan, np.float32)
    samples[: 10 * 16_000] = 0
    with pytest.raises(InvalidRequest, match="NaN"):
        async for _ in Windows(pcm(samples, 16_000, AUDIO), detector, VAD):
            pass


async def test_leaving_early_ends_the_decoding(detector: SpeechDetector, shared_audio: Path) -> None:
    async with AudioDecoder(AUDIO) as decoder:
        with (shared_audio / "en_long" / "lj001-chapter.flac").open("rb") as file:
            stream = Windows(decoder.decode(file), detector, VAD)
            assert (await anext(aiter(stream))).index == 0
            assert len(decoders()) == 1
            await stream.aclose()
            assert decoders() == []


async def test_closing_it_unused_closes_its_source(detector: SpeechDetector) -> None:
    closed = False

    async def blocks() -> AsyncGenerator[npt.NDArray[np.int16], None]:
        nonlocal closed
        try:
            for _ in range(100):
                yield noise(1)
        finally:
            closed = True

    source = blocks()
    await anext(source)
    await Windows(source, detector, VAD).aclose()
    assert closed
