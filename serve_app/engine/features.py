"""Log-mel features of windows, as openai-whisper computes them."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.constants import HOP_LENGTH, N_FFT, WINDOW_FRAMES, WINDOW_SAMPLES

INT16_SCALE = 1 / 32768


@lru_cache
def mel_filters(n_mels: int) -> Tensor:
    """Mel filter bank [n_mels, 201] from openai-whisper's own file; found without importing that package, which takes
    seconds."""
    if n_mels not in (80, 128):
        raise ValueError(f"Whisper models have 80 or 128 mel bands, not {n_mels}")
    spec = find_spec("whisper")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "assets" / "mel_filters.npz"
    with np.load(path, allow_pickle=False) as archive:
        return torch.from_numpy(archive[f"mel_{n_mels}"])


class LogMel:
    """int16 samples of up to 30 s → log-mel [n_mels, 3000], float32."""

    def __init__(self, n_mels: int, device: torch.device | str = "cpu"):
        self.n_mels = n_mels
        self.device = torch.device(device)
        self.filters = mel_filters(n_mels).to(self.device)
        self.hann = torch.hann_window(N_FFT, device=self.device)

    @torch.inference_mode()
    def __call__(self, windows: list[np.ndarray]) -> Tensor:
        """windows: int16 [n] each, 0 < n ≤ 480,000, 16 kHz mono → [len(windows), n_mels, 3000].

        A window shorter than 30 s is padded with silence. Frames of that silence all have the same value, so only the
        frames that see a sample are computed.
        """
        longest = max(len(w) for w in windows)
        if longest > WINDOW_SAMPLES or min(len(w) for w in windows) == 0:
            raise ValueError(f"a window holds 1 to {WINDOW_SAMPLES} samples, got {[len(w) for w in windows]}")
        # NOTES: one frame of zeros behind the longest window, so that the transform's reflection at the end mirrors
        # silence, as it does where the whole 30 s are computed.
        length = min(WINDOW_SAMPLES, -(-(longest + N_FFT) // HOP_LENGTH) * HOP_LENGTH)
        samples = torch.zeros(len(windows), length)
        for row, window in zip(samples, windows, strict=True):
            # the object store's arrays are read-only; the copy into the row is the conversion to float
            row[: len(window)] = torch.from_numpy(window.astype(np.float32))
        samples = samples.to(self.device) * INT16_SCALE

        spectrum = torch.stft(samples, N_FFT, HOP_LENGTH, window=self.hann, return_complex=True)
        power = spectrum[..., :-1].abs() ** 2  # [windows, 201, length / 160]
        log_mel = torch.clamp(self.filters @ power, min=1e-10).log10()
        floor = log_mel.amax(dim=(1, 2), keepdim=True) - 8.0
        log_mel = torch.maximum(log_mel, floor)
        silence = torch.maximum(torch.full_like(floor, -10.0), floor)
        padded = silence.expand(-1, self.n_mels, WINDOW_FRAMES).clone()
        padded[..., : log_mel.shape[-1]] = log_mel
        return (padded + 4.0) / 4.0
