"""Log-mel features of many windows in one go, on the GPU; samples are read from its memory or from the host's.

The features are openai-whisper's: frames of 25 ms every 10 ms, Hann, power spectrum, 80 or 128 mel bands, logarithm, at
most 8 decades under the window's maximum. See ``cuda/log_mel.cu`` for how the work is cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import log

import numpy as np
import torch
from torch import Tensor

from kernels.compile import Build, build
from kernels.launch import Kernel

SAMPLE_RATE = 16_000
N_FFT = 400
HOP_LENGTH = 160
BINS = N_FFT // 2 + 1
WINDOW_SAMPLES = 30 * SAMPLE_RATE
FRAMES = WINDOW_SAMPLES // HOP_LENGTH

COLUMNS = 20
"""The transform's 400 points are 20 × 20."""
ROLES = COLUMNS // 2
"""Threads that share a pair of frames."""
PAIRS = 16
"""Pairs of frames in a tile, 320 ms of audio: see docs/kernels.md. (256 ms would not be a whole number of frames.)"""

LAG = 10
"""Windows by which lifting a tile to the floor follows its making: more than all blocks have in hand, so that they need
not wait, and less than the GPU's cache holds."""

SAMPLE_SCALES = {torch.int16: 1 / 32768, torch.float32: 1.0}
ALIGNMENT = 16
"""Bytes. A window that begins at a multiple of this is read 16 bytes at a time."""


# ---- tables ----


def mel_points(n_mels: int) -> np.ndarray:
    """Where the triangles of ``n_mels`` bands begin, peak and end, in Hz: [n_mels + 2], evenly spaced in mel (Slaney's
    scale: linear up to 1 kHz, logarithmic above)."""
    linear, break_frequency, step = 200 / 3, 1000.0, log(6.4) / 27
    top = break_frequency / linear + log(SAMPLE_RATE / 2 / break_frequency) / step
    mels = np.linspace(0.0, top, n_mels + 2)
    above = break_frequency * np.exp(step * (mels - break_frequency / linear))
    points: np.ndarray = np.where(mels >= break_frequency / linear, above, linear * mels)
    return points


@lru_cache
def mel_filters(n_mels: int) -> np.ndarray:
    """Mel filter bank [n_mels, 201], float32: triangles of equal area. Bit for bit what openai-whisper brings as a file
    and librosa makes (its roundings in their order)."""
    if n_mels not in (80, 128):
        raise ValueError(f"Whisper models have 80 or 128 mel bands, not {n_mels}")
    points = mel_points(n_mels)
    distances = points[:, None] - np.arange(BINS) * (SAMPLE_RATE / N_FFT)
    spacing = np.diff(points)
    rising, falling = -distances[:-2] / spacing[:-1, None], distances[2:] / spacing[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    area = 2.0 / (points[2:] - points[:-2])
    filters: np.ndarray = (triangles * area[:, None]).astype(np.float32)
    return filters


def mel_edges(n_mels: int) -> tuple[np.ndarray, np.ndarray]:
    """The same filters, bin by bin.

    Returns the weights [201, 2] of each bin in the band that falls and in the band that rises there, and the bins at
    which the n_mels + 1 segments between mel points end: band b rises in segment b and falls in segment b + 1.
    """
    filters, points = mel_filters(n_mels), mel_points(n_mels)
    ends = np.minimum(np.searchsorted(np.arange(BINS) * (SAMPLE_RATE / N_FFT), points[1:]), BINS - 1)
    weights = np.zeros((BINS, 2), np.float32)
    for bin in range(1, BINS - 1):  # the first and the last have no weight in any band
        segment = int(np.searchsorted(ends, bin, side="right"))
        weights[bin, 0] = filters[segment - 1, bin] if segment > 0 else 0.0
        weights[bin, 1] = filters[segment, bin] if segment < n_mels else 0.0
    return weights, ends.astype(np.int32)


def share_bands(ends: Sequence[int], parts: int, *, band_cost: float = 2.0) -> list[int]:
    """Cuts the bands into ``parts`` neighbouring groups so that the costliest costs least: the bins of their segments,
    and ``band_cost`` bins for each band's logarithm. Returns where the groups begin, and the number of bands."""
    bands = len(ends) - 1
    begins = [1, *ends]

    def cost(first: int, last: int) -> float:
        return begins[last + 1] - begins[first] + band_cost * (last - first)

    best = [[0.0] * (bands + 1) for _ in range(parts + 1)]
    cut = [[0] * (bands + 1) for _ in range(parts + 1)]
    best[0] = [0.0, *[float("inf")] * bands]
    for part in range(1, parts + 1):
        for last in range(bands + 1):
            options = [(max(best[part - 1][first], cost(first, last)), first) for first in range(last + 1)]
            best[part][last], cut[part][last] = min(options)
    groups = [bands]
    for part in range(parts, 0, -1):
        groups.append(cut[part][groups[-1]])
    return groups[::-1]


STEP = np.dtype([("falling", np.float32), ("rising", np.float32), ("bin", np.int32), ("done", np.int32)])
STEPS_AT_ONCE = 4


@lru_cache
def mel_steps(n_mels: int, parts: int) -> np.ndarray:
    """The filters as programs for ``parts`` warps, [parts, steps] of STEP: add a bin's power, weighted, to two sums; if
    a band is ``done``, it is the first sum, whose place the second takes. Padded with steps that do nothing.
    """
    weights, ends = mel_edges(n_mels)
    begins = [1, *ends.tolist()]
    groups = share_bands(ends.tolist(), parts)
    programs = []
    for first, last in pairwise(groups):
        program: list[tuple[float, float, int, int]] = []
        for segment in range(first, last + 1) if last > first else ():
            bins = range(begins[segment], ends[segment])
            if segment == first:  # of the band that falls here another warp takes care; the sums are not yet exchanged
                program += [(float(weights[bin, 1]), 0.0, bin, -1) for bin in bins]
                continue
            program += [(float(weights[bin, 0]), float(weights[bin, 1]), bin, -1) for bin in bins]
            if not bins:
                program.append((0.0, 0.0, 1, -1))
            program[-1] = (*program[-1][:3], segment - 1)
        programs.append(program)
    longest = -(-max(map(len, programs)) // STEPS_AT_ONCE) * STEPS_AT_ONCE
    return np.array([program + [(0.0, 0.0, 1, -1)] * (longest - len(program)) for program in programs], STEP)


def _tables(scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """hann and twiddles, as the kernel wants them."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    columns = np.arange(COLUMNS).reshape(ROLES, 1, 2)
    rows = np.arange(COLUMNS)[:, None]
    # halved: the powers of two frames come four-fold from their joint transform
    hann = window[columns + COLUMNS * rows].transpose(0, 2, 1) * (scale / 2)
    twiddles = np.exp(-2j * np.pi * columns * rows / N_FFT)
    both = np.stack([twiddles.real, twiddles.imag], axis=-1)
    return tuple(torch.from_numpy(table.astype(np.float32, order="C")).to(device) for table in (hann, both))  # type: ignore[return-value]


# ---- windows in one buffer ----


def lay_out(lengths: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """Offsets, in samples, at which windows of these lengths lie one behind the other, each where the kernel reads it
    fastest, and the size of the buffer that holds them."""
    step = ALIGNMENT // dtype.itemsize
    offsets, end = [], 0
    for length in lengths:
        offsets.append(end)
        end += -(-length // step) * step
    return offsets, end


def pack(windows: Sequence[Tensor], *, pin_memory: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Windows [n] each, int16 or float32 → samples, offsets and lengths in host memory, as the kernel takes them (the
    last two have to be moved to the GPU). pin_memory: page-locked, so that the GPU can read the samples in place, and
    the host need not wait for the others' move."""
    dtype = windows[0].dtype
    lengths = [len(w) for w in windows]
    offsets, size = lay_out(lengths, dtype)
    samples = torch.zeros(size, dtype=dtype, pin_memory=pin_memory)
    for offset, window in zip(offsets, windows, strict=True):
        samples[offset : offset + len(window)] = window
    begins = torch.tensor(offsets, dtype=torch.int64, pin_memory=pin_memory)
    return samples, begins, torch.tensor(lengths, dtype=torch.int32, pin_memory=pin_memory)


# ---- launcher ----


def log_mel_build(sample: torch.dtype, dtype: torch.dtype, frames_first: bool, pairs: int = PAIRS) -> Build:
    return build(
        "log_mel.cu",
        PAIRS=pairs,
        SAMPLE_FLOAT=int(sample == torch.float32),
        OUTPUT_HALF=int(dtype == torch.float16),
        FRAMES_FIRST=int(frames_first),
    )


def shared_bytes(sample: torch.dtype, pairs: int) -> int:
    """Dynamic shared memory of a block, as the source lays it out."""
    pair_samples = 2 * HOP_LENGTH
    pair_bytes = pair_samples * sample.itemsize + 4 * max(2, 32 // pairs)
    tile_samples = pairs * pair_samples + N_FFT - HOP_LENGTH
    exchange = COLUMNS * ROLES * pairs * 16
    return exchange + max(-(-tile_samples // pair_samples) * pair_bytes, (BINS - 1) * pairs * 8)


class LogMelKernel:
    """Log-mel features with 80 or 128 bands, on one GPU."""

    def __init__(self, n_mels: int, device: torch.device, *, pairs: int = PAIRS):
        """pairs: of frames in a tile; the default is what measured best."""
        mel_filters(n_mels)  # refuses other numbers of bands
        self.n_mels, self.device, self.pairs = n_mels, device, pairs
        self.tiles = -(-FRAMES // (2 * pairs))
        warps = -(-ROLES * pairs // 32)
        self._threads = 32 * warps
        steps = mel_steps(n_mels, warps // -(-2 * pairs // 32))
        self._steps = torch.from_numpy(steps.view(np.int32)).to(device)
        self._step_count = ctypes.c_int(steps.shape[1])
        self._tables = {sample: _tables(scale, device) for sample, scale in SAMPLE_SCALES.items()}
        self._kernels: dict[tuple[torch.dtype, torch.dtype, bool], Kernel] = {}
        properties = torch.cuda.get_device_properties(device)
        fit = properties.shared_memory_per_multiprocessor // (shared_bytes(torch.float32, pairs) + 1024)
        self._blocks = properties.multi_processor_count * max(1, min(fit, 480 // self._threads))

    def _kernel(self, sample: torch.dtype, dtype: torch.dtype, frames_first: bool) -> Kernel:
        key = (sample, dtype, frames_first)
        if key not in self._kernels:
            made = log_mel_build(*key, self.pairs)
            self._kernels[key] = Kernel(made, "log_mel", self.device, shared_bytes=shared_bytes(sample, self.pairs))
        return self._kernels[key]

    def __call__(
        self,
        samples: Tensor,
        offsets: Tensor,
        lengths: Tensor,
        out: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        frames_first: bool = False,
    ) -> Tensor:
        """Features [windows, n_mels, 3000], or [windows, 3000, n_mels] with ``frames_first`` (FP16 only).

        samples: flat, int16 or float32 in [-1, 1), 16 kHz mono; on the GPU, or in pinned host memory, which the kernel
        then reads over the bus: the host must leave it alone until the stream has come past this call. offsets int64,
        lengths int32, [windows] each, on the GPU: the sample at which each window begins, and how many it has, at most
        480,000; the rest of its 30 s is silence. Windows may lie anywhere, but are read faster where they begin at a
        multiple of 16 bytes (``lay_out``). dtype: of the result, float32 or float16.
        """
        windows = lengths.shape[0]
        if samples.dtype not in SAMPLE_SCALES or samples.dim() != 1 or not samples.is_contiguous():
            raise ValueError(f"samples must be flat int16 or float32, not {samples.dtype} {list(samples.shape)}")
        if not samples.is_cuda and not samples.is_pinned():
            raise ValueError("samples must lie on the GPU or in pinned host memory")
        for name, tensor, kind in (("offsets", offsets, torch.int64), ("lengths", lengths, torch.int32)):
            if tensor.shape != (windows,) or tensor.dtype != kind or not tensor.is_cuda or not tensor.is_contiguous():
                raise ValueError(f"{name} must be [windows] {kind} on the GPU, not {list(tensor.shape)} {tensor.dtype}")
        if dtype not in (torch.float32, torch.float16) or (frames_first and dtype != torch.float16):
            raise ValueError(f"features are float32 or float16, with frames first float16 only; not {dtype}")
        shape = (windows, FRAMES, self.n_mels) if frames_first else (windows, self.n_mels, FRAMES)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=self.device)
        elif out.shape != shape or out.dtype != dtype or not out.is_contiguous() or not out.is_cuda:
            raise ValueError(f"out must be {list(shape)} {dtype} on the GPU, not {list(out.shape)} {out.dtype}")
        if windows == 0:
            return out
        kernel = self._kernel(samples.dtype, dtype, frames_first)
        least = torch.empty(windows, self.tiles, device=self.device)
        state = torch.zeros(1 + 2 * windows, dtype=torch.int32, device=self.device)
        kernel(
            min(self._blocks, 2 * windows * self.tiles),
            self._threads,
            samples,
            offsets,
            lengths,
            *self._tables[samples.dtype],
            self._steps,
            out,
            least,
            state,
            ctypes.c_int(windows),
            ctypes.c_int(min(LAG, windows) * self.tiles),
            ctypes.c_int(self.n_mels),
            self._step_count,
        )
        return out


def reference(windows: Sequence[Tensor], n_mels: int, *, precision: torch.dtype = torch.float64) -> Tensor:
    """windows: int16 or float32 [n] each → [windows, n_mels, 3000], in plain PyTorch, on the windows' device."""
    device = windows[0].device
    padded = torch.zeros(len(windows), WINDOW_SAMPLES, dtype=precision, device=device)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window.to(precision) * SAMPLE_SCALES[window.dtype]
    hann = torch.hann_window(N_FFT, dtype=precision, device=device)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=hann, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    filters = torch.from_numpy(mel_filters(n_mels)).to(device, precision)
    log_mel = torch.clamp(filters @ power, min=1e-10).log10()
    log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_mel + 4.0) / 4.0


BUILDS = tuple(
    log_mel_build(sample, dtype, frames_first)
    for sample in SAMPLE_SCALES
    for dtype, frames_first in ((torch.float32, False), (torch.float16, False), (torch.float16, True))
)
