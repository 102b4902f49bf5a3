from __future__ import annotations

import numpy as np
import pytest
import torch
import whisper
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.constants import WINDOW_SAMPLES
from serve_app.engine.features import LogMel
from serve_app.engine.precision import Compute

FLOAT32 = Compute.resolve("cpu", "float32")


def reference(samples: np.ndarray, n_mels: int) -> torch.Tensor:
    padded = whisper.pad_or_trim(samples.astype(np.float32) / 32768)
    return whisper.log_mel_spectrogram(padded, n_mels)


@pytest.mark.parametrize("n_mels", [80, 128])
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, WINDOW_SAMPLES) | st.sampled_from([1, 159, 160, 479_599, 479_600, 479_999, 480_000]))
def test_a_window_of_any_length_has_the_features_of_openai_whisper(n_mels: int, length: int) -> None:
    samples = np.random.default_rng(length).normal(0, 3000, length).astype(np.int16)
    torch.testing.assert_close(LogMel(n_mels, FLOAT32)([samples])[0], reference(samples, n_mels), rtol=0, atol=1e-5)


def test_windows_of_different_lengths_do_not_affect_each_other(speech: np.ndarray) -> None:
    log_mel = LogMel(80, FLOAT32)
    windows = [speech[:1000], speech[:100_000], speech]
    torch.testing.assert_close(log_mel(windows), torch.cat([log_mel([w]) for w in windows]), rtol=0, atol=1e-5)


def test_silence_has_the_features_of_openai_whisper() -> None:
    silence = np.zeros(16_000, np.int16)
    torch.testing.assert_close(LogMel(80, FLOAT32)([silence])[0], reference(silence, 80))


@pytest.mark.parametrize("length", [0, WINDOW_SAMPLES + 1])
def test_a_window_that_is_empty_or_too_long_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 480000 samples"):
        LogMel(80, FLOAT32)([np.zeros(length, np.int16)])
