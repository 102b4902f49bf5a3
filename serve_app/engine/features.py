"""Log-mel features of windows, as openai-whisper computes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.log_mel import LogMelKernel, mel_filters, pack
from serve_app.engine.constants import HOP_LENGTH, N_FFT, WINDOW_FRAMES, WINDOW_SAMPLES
from serve_app.engine.precision import Compute
from serve_app.engine.tensors import as_tensor

INT16_SCALE = 1 / 32768


class LogMel:
    """int16 samples of up to 30 s → log-mel [n_mels, 3000]: FP16 where the kernels compute, else float32."""

    def __init__(self, n_mels: int, compute: Compute):
        self.n_mels, self.compute = n_mels, compute
        self.filters = torch.from_numpy(mel_filters(n_mels)).to(compute.device)
        self.hann = torch.hann_window(N_FFT, device=compute.device)
        self._kernel = LogMelKernel(n_mels, compute.device) if compute.has_kernels else None
        self._reading: tuple[Tensor, torch.cuda.Event] | None = None  # samples, and when they are no longer needed

    @torch.inference_mode()
    def __call__(self, windows: list[np.ndarray]) -> Tensor:
        """windows: int16 [n] each, 0 < n ≤ 480,000, 16 kHz mono → [len(windows), n_mels, 3000].

        A window shorter than 30 s is padded with silence. On a GPU the result is there once the stream has come so far.
        """
        longest = max(len(w) for w in windows)
        if longest > WINDOW_SAMPLES or min(len(w) for w in windows) == 0:
            raise ValueError(f"a window holds 1 to {WINDOW_SAMPLES} samples, got {[len(w) for w in windows]}")
        if self._kernel is None:
            return self._plain(windows, longest)
        # the kernel reads the samples where they are, in pinned memory of the host
        samples, offsets, lengths = pack([as_tensor(window) for window in windows], pin_memory=True)
        if self._reading is not None:
            self._reading[1].synchronize()  # the last call's samples go now
        device = self.compute.device
        # without a wait in between: where other processes are on the GPU, each lasts several of its time slices
        offsets, lengths = offsets.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
        features = self._kernel(samples, offsets, lengths, dtype=torch.float16)
        read = torch.cuda.Event(blocking=True)
        read.record()
        self._reading = samples, read
        return features

    def _plain(self, windows: list[np.ndarray], longest: int) -> Tensor:
        """Frames of the silence behind a window all have the same value: only those that see a sample are computed."""
        # NOTES: one frame of zeros behind the longest window, so that the transform's reflection at the end mirrors
        # silence, as it does where the whole 30 s are computed.
        length = min(WINDOW_SAMPLES, -(-(longest + N_FFT) // HOP_LENGTH) * HOP_LENGTH)
        samples = torch.zeros(len(windows), length)
        for row, window in zip(samples, windows, strict=True):
            # the object store's arrays are read-only; the copy into the row is the conversion to float
            row[: len(window)] = torch.from_numpy(window.astype(np.float32))
        samples = samples.to(self.compute.device) * INT16_SCALE

        spectrum = torch.stft(samples, N_FFT, HOP_LENGTH, window=self.hann, return_complex=True)
        power = spectrum[..., :-1].abs() ** 2  # [windows, 201, length / 160]
        log_mel = torch.clamp(self.filters @ power, min=1e-10).log10()
        floor = log_mel.amax(dim=(1, 2), keepdim=True) - 8.0
        log_mel = torch.maximum(log_mel, floor)
        silence = torch.maximum(torch.full_like(floor, -10.0), floor)
        padded = silence.expand(-1, self.n_mels, WINDOW_FRAMES).clone()
        padded[..., : log_mel.shape[-1]] = log_mel
        return (padded + 4.0) / 4.0
