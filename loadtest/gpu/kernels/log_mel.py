"""Log-mel features beside openai-whisper's computation in PyTorch: ``python -m loadtest.gpu.kernels.log_mel``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.log_mel import HOP_LENGTH, N_FFT, PAIRS, SAMPLE_RATE, WINDOW_SAMPLES, LogMelKernel, mel_filters, pack
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds

TILES = (4, 8, 16, 32)
"""Pairs of frames: 80, 160, 320 and 640 ms of audio."""


def openai_log_mel(audio: Tensor, filters: Tensor, hann: Tensor) -> Tensor:
    """``whisper.audio.log_mel_spectrogram`` for float samples [480000], or [windows, 480000] at once."""
    spectrum = torch.stft(audio, N_FFT, HOP_LENGTH, window=hann, return_complex=True)
    magnitudes = spectrum[..., :-1].abs() ** 2
    log_spec = torch.clamp(filters @ magnitudes, min=1e-10).log10()
    greatest = log_spec.amax(dim=(-2, -1), keepdim=True) if audio.dim() == 2 else log_spec.max()
    return (torch.maximum(log_spec, greatest - 8.0) + 4.0) / 4.0


def noise(windows: int, seconds: float, decades: float) -> list[Tensor]:
    """Noise whose loudness changes every 50 ms by up to so many decades of amplitude. With 3.5 some of every tile lies
    under the floor, as in telephone speech, with 1 nothing does, as in most recordings."""
    generator = torch.Generator().manual_seed(0)
    length = int(seconds * SAMPLE_RATE)
    loudness = 10 ** (-decades * torch.rand(windows, length // 800, generator=generator))
    samples = torch.randn(windows, length, generator=generator) * loudness.repeat_interleave(800, dim=1) * 8000
    return list(samples.clamp(-32768, 32767).to(torch.int16))


def measure(windows: int = 128) -> list[Row]:
    """Milliseconds for ``windows`` of 30 s, then for fewer and for shorter ones, then with samples on the host."""
    device = torch.device("cuda")
    samples, offsets, lengths = pack(noise(windows, 30, 3.5))
    offsets, lengths = offsets.to(device), lengths.to(device)
    on_gpu, floats = samples.to(device), samples.to(device).float() / 32768
    pinned = samples.pin_memory()
    whole = F.pad(floats, (0, windows * WINDOW_SAMPLES - len(floats))).view(windows, WINDOW_SAMPLES)
    filters, hann = torch.from_numpy(mel_filters(80)).to(device), torch.hann_window(N_FFT, device=device)

    def openai(audio: Tensor) -> float:
        return graph_milliseconds([lambda: openai_log_mel(audio, filters, hann)])

    rows: list[Row] = []

    def add(
        name: str, run: Callable[[], object], size: int, count: int = windows, library: float | None = None
    ) -> None:
        rows.append(Row(name, f"{count} windows", graph_milliseconds([run]), bytes=size, library=library))

    kernel = LogMelKernel(80, device)
    out = torch.empty(windows, 80, 3000, device=device)
    size = samples.nbytes + out.nbytes
    add("log-mel", lambda: kernel(on_gpu, offsets, lengths, out), size, library=openai(whole))
    one = partial(kernel, on_gpu, offsets[:1], lengths[:1], out[:1])
    add("log-mel", one, size // windows, 1, library=openai(whole[0]))
    for few in (8, 32):
        add("log-mel", partial(kernel, on_gpu, offsets[:few], lengths[:few], out[:few]), size * few // windows, few)
    narrow = pack(noise(windows, 30, 1.0))[0].to(device)
    add("log-mel, nothing under the floor", lambda: kernel(narrow, offsets, lengths, out), size)
    short = torch.full_like(lengths, 5 * SAMPLE_RATE)
    add("log-mel, 5 s of 30", lambda: kernel(on_gpu, offsets, short, out), samples.nbytes // 6 + out.nbytes)
    for pairs in TILES:
        tiled = LogMelKernel(80, device, pairs=pairs)
        add(f"log-mel, tiles of {pairs * 20} ms", partial(tiled, on_gpu, offsets, lengths, out), size)
    for n_mels in (80, 128):
        banded = LogMelKernel(n_mels, device)
        for dtype, frames_first in ((torch.float32, False), (torch.float16, False), (torch.float16, True)):
            for source in (on_gpu, floats):
                into = banded(source, offsets, lengths, dtype=dtype, frames_first=frames_first)
                kinds = f"{source.dtype} to {dtype}".replace("torch.", "")
                add(
                    f"log-mel, {n_mels} bands, {kinds}{', frames first' * frames_first}",
                    partial(banded, source, offsets, lengths, into, dtype=dtype, frames_first=frames_first),
                    source.nbytes + into.nbytes,
                )
    in_turn = graph_milliseconds([lambda: [openai_log_mel(window, filters, hann) for window in whole]])
    return [
        *rows,
        Row("log-mel by PyTorch, one window after the other", f"{windows} windows", in_turn),
        *_from_host(kernel, pinned, on_gpu, offsets, lengths, out),
    ]


def _from_host(
    kernel: LogMelKernel, pinned: Tensor, on_gpu: Tensor, offsets: Tensor, lengths: Tensor, out: Tensor
) -> list[Row]:
    """With the samples in pinned host memory; their copy alone is the bus's bound."""
    copied = torch.empty_like(on_gpu)

    def copy() -> None:
        copied.copy_(pinned, non_blocking=True)

    def staged() -> None:
        copy()
        kernel(copied, offsets, lengths, out)

    bus = graph_milliseconds([copy])

    def row(name: str, run: Callable[[], object]) -> Row:
        taken = graph_milliseconds([run])
        return Row(f"log-mel, {name}", f"{len(lengths)} windows", taken, more={"of the bus": bus / taken})

    reading = {pairs: LogMelKernel(80, out.device, pairs=pairs) for pairs in (PAIRS, 32)}
    return [
        Row("samples copied to the GPU", f"{len(lengths)} windows", bus),
        row("copy, then the kernel", staged),
        *(
            row(f"host memory, tiles of {pairs * 20} ms", partial(reader, pinned, offsets, lengths, out))
            for pairs, reader in reading.items()
        ),
    ]


if __name__ == "__main__":
    report.main(measure, __doc__)
