from __future__ import annotations

import io
import wave

import av
import pytest

from loadtest import uploads


def test_nine_hours_of_opus_fit_into_25_mb() -> None:
    content = uploads.opus(9 * uploads.HOUR_S)
    assert len(content) < 25_000_000
    with av.open(io.BytesIO(content)) as container:
        assert container.format.name == "ogg"
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(9 * uploads.HOUR_S, abs=1)


def test_the_opus_decodes_to_as_much_audio_as_it_claims() -> None:
    with av.open(io.BytesIO(uploads.opus(120, pattern_s=30))) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == pytest.approx(120 * 48_000, abs=960)


def test_bare_aac_frames_are_small_for_what_they_decode_to() -> None:
    assert len(uploads.aac(9 * uploads.HOUR_S)) < 4_000_000
    with av.open(io.BytesIO(uploads.aac(120))) as container:
        assert container.format.name == "aac"
        assert sum(frame.samples for frame in container.decode(audio=0)) == pytest.approx(120 * 8_000, abs=1024)


def test_a_wav_is_honest_by_default() -> None:
    with wave.open(io.BytesIO(uploads.wav(channels=2, seconds=0.5))) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getnframes()) == (16_000, 2, 8_000)


@pytest.mark.parametrize("rate", [1, 400_000, 2**31 - 1, 2**32 - 1])
def test_a_wav_claims_the_sample_rate_it_is_told_to(rate: int) -> None:
    content = uploads.wav(sample_rate=rate)
    assert int.from_bytes(content[24:28], "little") == rate
    assert len(content) < 40_000


def test_a_wav_has_as_many_channels_as_it_is_told_to() -> None:
    with av.open(io.BytesIO(uploads.wav(channels=64))) as container:
        assert container.streams.audio[0].channels == 64


def test_a_wav_claims_more_data_than_it_holds() -> None:
    content = uploads.wav(data_bytes=2**32 - 1)
    assert int.from_bytes(content[40:44], "little") == 2**32 - 1
    assert len(content) < 40_000


def test_playlists_name_their_targets() -> None:
    target = "http://127.0.0.1:1/audio.wav"
    assert uploads.hls_playlist(target).startswith(b"#EXTM3U\n")
    assert uploads.concat_list(target).startswith(b"ffconcat version 1.0\n")
    for playlist in (uploads.hls_playlist(target), uploads.concat_list(target), uploads.dash_manifest(target)):
        assert target.encode() in playlist
