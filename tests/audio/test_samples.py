from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audio.samples import Resampler, pcm, to_mono
from serve_app.errors import AudioTooLarge, InvalidAudio, InvalidRequest
from serve_app.settings import AudioSettings
from tests.audio.make import noise, tone

SETTINGS = AudioSettings()


async def collect(samples: npt.NDArray[Any], rate: int, settings: AudioSettings = SETTINGS) -> npt.NDArray[np.int16]:
    return np.concatenate([block async for block in pcm(samples, rate, settings)])


def resample(mono: npt.NDArray[np.float32], rate: int, portions: int) -> npt.NDArray[np.int16]:
    resampler = Resampler()
    parts = np.array_split(mono, portions)
    blocks = [block for part in parts for block in resampler.push(part[None], rate)]
    return np.concatenate([*blocks, *resampler.finish(), np.zeros(0, np.int16)])


async def test_int16_at_16_khz_passes_bit_for_bit() -> None:
    samples: npt.NDArray[np.int16] = np.arange(-32768, 32768).astype(np.int16)
    assert np.array_equal(await collect(samples, 16_000), samples)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
async def test_floats_are_scaled_to_int16(dtype: type) -> None:
    samples = np.array([0.0, 0.5, -0.5, -1.0, 1.0], dtype)
    assert (await collect(samples, 16_000)).tolist() == [0, 16384, -16384, -32768, 32767]


async def test_channels_are_averaged() -> None:
    samples = np.array([[1000, 3000], [-200, 200]], np.int16)
    assert (await collect(samples, 16_000)).tolist() == [2000, 0]


async def test_blocks_are_about_a_second() -> None:
    blocks = [block async for block in pcm(noise(20.5, 44_100), 44_100, SETTINGS)]
    assert max(len(block) for block in blocks) <= 17_000
    assert sum(len(block) for block in blocks) == round(20.5 * 16_000)


async def test_resampling_keeps_the_tone() -> None:
    samples = await collect(tone(2, 48_000), 48_000)
    expected = tone(2, 16_000)
    inner = slice(1000, -1000)  # away from the edges, where the filter sees silence
    assert np.abs(samples[inner].astype(int) - expected[inner]).max() < 40


@given(
    rate=st.sampled_from([4000, 8000, 11_025, 16_000, 22_050, 44_100, 48_000, 192_000]),
    length=st.integers(1, 50_000),
    portions=st.integers(1, 9),
)
def test_how_a_recording_is_portioned_changes_nothing(rate: int, length: int, portions: int) -> None:
    mono = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    whole = resample(mono, rate, 1)
    assert np.array_equal(resample(mono, rate, portions), whole)
    assert abs(len(whole) - length * 16_000 / rate) <= 1


def test_the_rate_may_change_on_the_way() -> None:
    resampler = Resampler()
    blocks = [
        *resampler.push(np.ones((1, 8000), np.float32), 8000),
        *resampler.push(np.ones((1, 48_000), np.float32), 48_000),
    ]
    assert sum(map(len, [*blocks, *resampler.finish()])) == 32_000


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), [-1, 0, 127 / 128]),
        (np.array([[-(2**31), 2**30]], np.int32), [-1, 0.5]),
        (np.array([[np.nan, np.inf, -np.inf]], np.float32), [0, 1, -1]),
    ],
)
def test_every_sample_format_lies_between_minus_one_and_one(samples: npt.NDArray[Any], expected: list[float]) -> None:
    assert to_mono(samples).tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_samples_that_are_not_finite_are_refused(bad: float) -> None:
    samples = np.zeros(16_000, np.float32)
    samples[777] = bad
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        await collect(samples, 16_000)


async def test_integers_cast_to_float_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"must lie in \[-1, 1\]"):
        await collect(noise(1).astype(np.float32), 16_000)


@pytest.mark.parametrize(
    ("samples", "rate", "error", "message"),
    [
        ([0.0, 1.0], 16_000, InvalidRequest, "numpy array"),
        (np.zeros(9, np.int32), 16_000, InvalidRequest, "int32"),
        (np.zeros(0, np.float32), 16_000, InvalidRequest, "empty"),
        (np.zeros((2, 3, 4), np.float32), 16_000, InvalidRequest, "shape"),
        (np.zeros(9, np.float32), 16_000.5, InvalidRequest, "whole number"),
        (np.zeros(9, np.float32), 100, InvalidAudio, "lowest"),
        (np.zeros(9, np.float32), 10**9, AudioTooLarge, "sample rate"),
        (np.zeros((1, 16_000), np.float32), 16_000, AudioTooLarge, "16000 channels"),
        (np.zeros(16_000 * 3, np.float32), 16_000, AudioTooLarge, "longer than the limit of 2 seconds"),
    ],
)
def test_what_is_not_a_recording_is_refused_at_once(samples: Any, rate: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pcm(samples, rate, AudioSettings(max_seconds=2))
