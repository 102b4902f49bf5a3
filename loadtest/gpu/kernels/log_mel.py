"""Log-mel features beside openai-whisper's computation in PyTorch: ``python -m loadtest.gpu.kernels.log_mel``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.log_mel import HOP_LENGTH, N_FFT, PAIRS, SAMPLE_RATE, WINDOW_SAMPLES, LogMelKernel, mel_filters, pack
from loadtest.gpu.timing import graph_milliseconds

Row = dict[str, object]
BANDWIDTH = 3.0e12
"""Bytes a second of a device copy on an H100."""
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
    """Milliseconds for ``windows`` of 30 s, then for fewer and for shorter ones."""
    device = torch.device("cuda")
    samples, offsets, lengths = pack(noise(windows, 30, 3.5))
    offsets, lengths = offsets.to(device), lengths.to(device)
    on_gpu, floats = samples.to(device), samples.to(device).float() / 32768
    pinned = samples.pin_memory()
    rows: list[Row] = []

    def add(name: str, run: Callable[[], object], size: int, **more: object) -> float:
        milliseconds = graph_milliseconds([run])
        bound = size / BANDWIDTH * 1e3
        rows.append(
            {"name": name, "milliseconds": milliseconds, "bytes": size, "of_bound": bound / milliseconds, **more}
        )
        return milliseconds

    for pairs in TILES:
        kernel = LogMelKernel(80, device, pairs=pairs)
        out = torch.empty(windows, 80, 3000, device=device)
        add(
            f"tiles of {pairs * 20} ms",
            lambda kernel=kernel, out=out: kernel(on_gpu, offsets, lengths, out),  # type: ignore[misc]
            samples.nbytes + out.nbytes,
            windows=windows,
        )
    for n_mels in (80, 128):
        kernel = LogMelKernel(n_mels, device)
        for dtype, frames_first in ((torch.float32, False), (torch.float16, False), (torch.float16, True)):
            for source in (on_gpu, floats):
                out = kernel(source, offsets, lengths, dtype=dtype, frames_first=frames_first)
                add(
                    f"{n_mels} bands, {source.dtype} to {dtype}{', frames first' * frames_first}",
                    lambda s=source, k=kernel, o=out, d=dtype, f=frames_first: k(  # type: ignore[misc]
                        s, offsets, lengths, o, dtype=d, frames_first=f
                    ),
                    source.nbytes + out.nbytes,
                    windows=windows,
                )

    kernel = LogMelKernel(80, device)
    out = torch.empty(windows, 80, 3000, device=device)
    for few in (1, 8, 32):
        add(
            f"{few} windows",
            lambda few=few: kernel(on_gpu, offsets[:few], lengths[:few], out[:few]),  # type: ignore[misc]
            (samples.nbytes + out.nbytes) * few // windows,
            windows=few,
        )
    narrow = pack(noise(windows, 30, 1.0))[0].to(device)
    add("nothing under the floor", lambda: kernel(narrow, offsets, lengths, out), samples.nbytes + out.nbytes)
    short = torch.full_like(lengths, 5 * SAMPLE_RATE)
    add("5 s of 30", lambda: kernel(on_gpu, offsets, short, out), samples.nbytes // 6 + out.nbytes, windows=windows)

    copied = torch.empty_like(on_gpu)
    bus = add("copy to the GPU alone", lambda: copied.copy_(pinned, non_blocking=True), samples.nbytes)

    def staged() -> None:
        copied.copy_(pinned, non_blocking=True)
        kernel(copied, offsets, lengths, out)

    add("copy, then the kernel", staged, samples.nbytes, of_bus=bus / graph_milliseconds([staged]))
    for pairs in (PAIRS, 32):
        reading = LogMelKernel(80, device, pairs=pairs)

        def in_place(reading: LogMelKernel = reading) -> None:
            reading(pinned, offsets, lengths, out)

        taken = graph_milliseconds([in_place])
        add(f"host memory, tiles of {pairs * 20} ms", in_place, samples.nbytes, of_bus=bus / taken)

    filters, hann = torch.from_numpy(mel_filters(80)).to(device), torch.hann_window(N_FFT, device=device)
    whole = F.pad(floats, (0, windows * WINDOW_SAMPLES - len(floats))).view(windows, WINDOW_SAMPLES)
    size = floats.nbytes + out.nbytes
    add("PyTorch, all windows at once", lambda: openai_log_mel(whole, filters, hann), size, windows=windows)
    add(
        "PyTorch, one after the other", lambda: [openai_log_mel(w, filters, hann) for w in whole], size, windows=windows
    )
    add("PyTorch, one window", lambda: openai_log_mel(whole[0], filters, hann), size // windows, windows=1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = measure()
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
