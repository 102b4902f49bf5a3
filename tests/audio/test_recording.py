"""Decoding itself, without the sandbox around it."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.audio.recording import decode
from serve_app.audio.samples import Limits
from serve_app.errors import AudioTooLarge, InvalidAudio
from serve_app.settings import AudioSettings
from tests.audio.make import encode, film, noise, tone, wav

LIMITS = Limits.of(AudioSettings())


def limits(**changes: Any) -> Limits:
    return Limits.of(AudioSettings(**changes))


def samples(data: bytes, limits: Limits = LIMITS) -> npt.NDArray[np.int16]:
    return np.concatenate(list(decode(io.BytesIO(data).read, limits)))


def test_16_khz_mono_16_bit_passes_bit_for_bit() -> None:
    original = noise(3.21)
    assert np.array_equal(samples(wav(original)), original)
    assert np.array_equal(samples(encode(original, 16_000, "flac", "flac")), original)


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp3", "libmp3lame", {}),
        ("adts", "aac", {}),
        ("ipod", "aac", {}),
        ("ipod", "aac", {"movflags": "faststart"}),
        ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", "pcm_s16be", {}),
        ("caf", "pcm_s16be", {}),
        ("w64", "pcm_s16le", {}),
        ("au", "pcm_s16be", {}),
        ("aiff", "pcm_s16be", {}),
        ("matroska", "flac", {}),
        ("webm", "libopus", {}),
        ("ogg", "flac", {}),
        ("wav", "adpcm_ima_wav", {}),
    ],
)
def test_containers_and_codecs(container: str, codec: str, options: dict[str, str]) -> None:
    decoded = samples(encode(tone(3, 48_000), 48_000, container, codec, options)).astype(float)
    assert 3.0 <= len(decoded) / 16_000 < 3.1
    spectrum = np.abs(np.fft.rfft(decoded[8000:40_000] * np.hanning(32_000)))
    assert abs(np.argmax(spectrum) / 2 - 440) < 2  # bins of half a hertz


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<i4", "<f4", "<f8"])
def test_sample_formats(dtype: str) -> None:
    original = tone(1)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        stored = (original / 32768).astype(kind)
    elif kind.itemsize == 1:
        stored = (original // 256 + 128).astype(kind)
    else:
        stored = original.astype(kind) << (8 * kind.itemsize - 16)
    decoded = samples(wav(stored, format_tag=3 if kind.kind == "f" else 1))
    assert np.abs(decoded.astype(int) - original).max() <= (256 if kind.itemsize == 1 else 0)


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(1), np.zeros(16_000, np.int16)], axis=1)
    assert np.abs(samples(wav(stereo, channels=2)).astype(int) - tone(1) / 2).max() <= 1


def test_of_a_film_the_sound_is_decoded() -> None:
    assert 2.9 < len(samples(film(sound=tone(3)))) / 16_000 < 3.2


def test_a_stream_is_decoded_as_it_arrives() -> None:
    data = wav(noise(60))
    asked = 0

    def read_some(size: int) -> bytes:
        nonlocal asked
        asked += size
        return data[asked - size : asked]

    next(decode(read_some, LIMITS))
    assert asked < len(data)


def test_padding_in_the_last_frame_of_an_mp3_is_not_part_of_it() -> None:
    assert len(samples(encode(tone(3.3, 44_100), 44_100, "mp3", "libmp3lame"))) == round(3.3 * 16_000)


def test_a_streamed_wav_of_unknown_length_is_decoded() -> None:
    original = noise(2)
    assert np.array_equal(samples(wav(original, claimed_bytes=0xFFFFFFFF)), original)


def test_the_first_part_of_a_truncated_recording_is_decoded() -> None:
    original = noise(10)
    data = encode(original, 16_000, "flac", "flac")
    decoded = samples(data[: len(data) // 2])
    assert 4 < len(decoded) / 16_000 < 6
    assert np.array_equal(decoded, original[: len(decoded)])


def test_what_is_damaged_in_the_middle_is_skipped() -> None:
    data = bytearray(encode(tone(20, 44_100), 44_100, "mp3", "libmp3lame"))
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    assert 18 < len(samples(bytes(data))) / 16_000 < 20.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "a PNG image"),
        (b"%PDF-1.7" + bytes(500), "a PDF document"),
        (b"Dear sir or madam,\n" * 50, "text"),
        (noise(1).tobytes(), "unknown kind"),
        (b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(100), "RIFF file of kind AVI"),
        (wav(np.zeros(0, np.int16)), "WAV"),
        (encode(tone(2), 16_000, "ipod", "aac")[:-2000], r"index \(moov\) is missing"),
        (encode(tone(1), 16_000, "flac", "flac")[:60], "FLAC"),
        (film(), r"\(MP4/QuickTime\) has no audio stream"),
        (wav(tone(1), format_tag=0x161), "encoding that is not supported"),
    ],
)
def test_what_is_no_audio_says_so(data: bytes, message: str) -> None:
    with pytest.raises(InvalidAudio, match=message):
        samples(data)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (wav(noise(1), channels=64), {}, "64 channels"),
        (wav(noise(1), claimed_rate=2**31), {}, "WAV|sample rate"),
        (wav(noise(1), claimed_rate=2**31 - 1), {}, "sample rate of 2147483647 Hz"),
        (wav(noise(1), claimed_rate=1), {}, "sample rate of 1 Hz"),
        (wav(noise(1), claimed_rate=0), {}, "WAV|sample rate"),
        (wav(noise(3)), {"max_seconds": 2}, "longer than the limit of 2 seconds"),
        (wav(noise(3)), {"max_upload_bytes": 50_000}, "larger than the limit"),
        (wav(noise(3)), {"max_decoded_bytes": 50_000}, "Decoded, the recording is larger"),
        (encode(tone(3), 16_000, "mp3", "libmp3lame"), {"max_upload_bytes": 9_000}, "larger than the limit"),
    ],
)
def test_caps(data: bytes, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((AudioTooLarge, InvalidAudio), match=message):
        samples(data, limits(**changes))


@pytest.mark.parametrize(
    ("container", "codec"), [("ogg", "libopus"), ("flac", "flac"), ("matroska", "libopus"), ("ipod", "aac")]
)
def test_too_long_a_recording_is_refused_at_once_where_its_container_tells(container: str, codec: str) -> None:
    data = encode(tone(30, 48_000), 48_000, container, codec)
    with pytest.raises(AudioTooLarge, match="longer"):
        next(decode(io.BytesIO(data).read, limits(max_seconds=20)))


def test_uploads_that_name_other_files_are_refused_and_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(tone(1)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        called = threading.Event()
        server.settimeout(0.5)

        def listen() -> None:
            try:
                server.accept()
            except TimeoutError:
                return
            called.set()

        listener = threading.Thread(target=listen)
        listener.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/secret.wav"
        for target in (url, str(tmp_path / "secret.wav"), f"file:{tmp_path}/secret.wav"):
            for upload in (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile '{target}'\n",
                f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{target}</BaseURL></MPD>',
            ):
                with pytest.raises(InvalidAudio, match="not audio that is supported"):
                    samples(upload.encode())
        listener.join()
        assert not called.is_set()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(["mp3", "flac", "m4a", "wav", "opus", "webm"]),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=40)), max_size=12),
    cut=st.floats(0, 1),
)
def test_whatever_the_damage_it_decodes_or_is_refused(seed: str, damage: list[tuple[float, bytes]], cut: float) -> None:
    data = bytearray(SEEDS[seed])
    for place, junk in damage:
        at = int(place * len(data))
        data[at : at + len(junk)] = junk
    with contextlib.suppress(InvalidAudio, AudioTooLarge):
        for block in decode(io.BytesIO(bytes(data[: int(cut * len(data))])).read, LIMITS):
            assert block.dtype == np.int16


SEEDS = {
    "mp3": encode(tone(2, 44_100), 44_100, "mp3", "libmp3lame"),
    "flac": encode(tone(2), 16_000, "flac", "flac"),
    "m4a": encode(tone(2, 44_100), 44_100, "ipod", "aac", {"movflags": "faststart"}),
    "wav": wav(tone(2, 22_050), 22_050),
    "opus": encode(tone(2, 48_000), 48_000, "ogg", "libopus"),
    "webm": encode(tone(2, 48_000), 48_000, "webm", "libopus"),
}
