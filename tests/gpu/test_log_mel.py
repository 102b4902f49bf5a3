"""Log-mel features on a GPU, beside float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.log_mel import FRAMES, WINDOW_SAMPLES, LogMelKernel, pack, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda")
TOLERANCE = 2e-4  # in final units, of which Whisper's features span 2

# around the ends of tiles, the reflections at both ends, and the shortest
LENGTHS = (1, 2, 159, 200, 201, 399, 400, 4919, 4920, 4921, 5120, 5121, 16_000, 100_003, 479_840, 479_959, 480_000)


def speech_like(length: int, seed: int) -> Tensor:
    """Gliding harmonics with pauses, over faint noise; float64 in [-1, 1)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    t = torch.arange(length, device=DEVICE, dtype=torch.float64) / 16_000
    pitch = 140 + 60 * torch.sin(2 * math.pi * 0.7 * t + seed)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / 16_000
    voice = sum(torch.sin(k * phase) / k**1.3 for k in range(1, 25))
    loudness = torch.clamp(torch.sin(2 * math.pi * 1.3 * t), min=0) ** 2
    noise = torch.randn(length, device=DEVICE, dtype=torch.float64, generator=generator)
    return 0.2 * loudness * voice + 10 ** -(2 + seed % 3) * noise


def int16(samples: Tensor) -> Tensor:
    return (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)


def features(
    windows: list[Tensor],
    n_mels: int = 80,
    *,
    on_host: bool = False,
    dtype: torch.dtype = torch.float32,
    frames_first: bool = False,
    pairs: int = 16,
) -> Tensor:
    """The kernel's features into poisoned memory, bands first."""
    samples, offsets, lengths = pack([w.cpu() for w in windows], pin_memory=on_host)
    shape = (len(windows), FRAMES, n_mels) if frames_first else (len(windows), n_mels, FRAMES)
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    kernel = LogMelKernel(n_mels, DEVICE, pairs=pairs)
    kernel(
        samples if on_host else samples.to(DEVICE),
        offsets.to(DEVICE),
        lengths.to(DEVICE),
        out,
        dtype=dtype,
        frames_first=frames_first,
    )
    torch.cuda.synchronize()
    return out.transpose(1, 2) if frames_first else out


def error(computed: Tensor, windows: list[Tensor], n_mels: int = 80) -> float:
    difference = (computed.double() - reference(windows, n_mels)).abs().max()
    return math.inf if difference.isnan() else float(difference)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("floats", [False, True])
def test_small_windows_of_all_lengths(n_mels: int, floats: bool) -> None:
    windows = [speech_like(length, seed) for seed, length in enumerate(LENGTHS)]
    windows = [w.float() if floats else int16(w) for w in windows]
    assert error(features(windows, n_mels), windows, n_mels) < TOLERANCE


def pathological() -> dict[str, Tensor]:
    t = torch.arange(WINDOW_SAMPLES, device=DEVICE)
    generator = torch.Generator("cuda").manual_seed(5)
    noise = torch.randint(-1, 2, (WINDOW_SAMPLES,), device=DEVICE, generator=generator)
    clicks = torch.zeros(WINDOW_SAMPLES, device=DEVICE)
    clicks[::7919] = 32767
    begins = torch.where(t < 200_000, 0, 32767 * (t // 40 % 2 * 2 - 1))
    return {
        "silence": torch.zeros_like(t),
        "square wave": torch.where(t // 40 % 2 == 0, 32767, -32768),
        "fast square wave": torch.where(t % 2 == 0, 32767, -32768),
        "uneven square wave": torch.where((t * 7) // 311 % 2 == 0, 32767, -32768),
        "constant": torch.full_like(t, -32768),
        "tiny noise": noise,
        "clicks": clicks,
        "silence, then full scale": begins,
        "pure tone": 32767 * torch.sin(2 * math.pi * 1000.5 * t.double() / 16_000),
    }


@pytest.mark.parametrize("name", list(pathological()) if torch.cuda.is_available() else [])
def test_pathological_input(name: str) -> None:
    windows = [pathological()[name].to(torch.int16)]
    assert error(features(windows), windows) < TOLERANCE


def test_many_windows_in_one_launch() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, WINDOW_SAMPLES + 1, (130,), generator=generator).tolist()
    windows = [int16(speech_like(length, seed)) for seed, length in enumerate(lengths)]
    computed = features(windows)
    for begin in range(0, 130, 26):
        part = slice(begin, begin + 26)
        assert error(computed[part], windows[part]) < TOLERANCE


@pytest.mark.parametrize("floats", [False, True])
def test_windows_may_begin_anywhere(floats: bool) -> None:
    lengths = [5001, 30_003, 479_999, 10_007]
    windows = [speech_like(length, seed) for seed, length in enumerate(lengths)]
    windows = [w.float() if floats else int16(w) for w in windows]
    offsets = torch.tensor([0, *torch.cumsum(torch.tensor(lengths), 0).tolist()][:-1], device=DEVICE)
    out = LogMelKernel(80, DEVICE)(torch.cat(windows), offsets, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    assert error(out, windows) < TOLERANCE


@pytest.mark.parametrize("floats", [False, True])
def test_small_samples_are_read_in_the_hosts_memory(floats: bool) -> None:
    windows = [speech_like(length, seed) for seed, length in enumerate((480_000, 70_000, 5))]
    windows = [w.float() if floats else int16(w) for w in windows]
    assert torch.equal(features(windows, on_host=True), features(windows))


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("frames_first", [False, True])
def test_small_half_precision_is_the_rounded_result(n_mels: int, frames_first: bool) -> None:
    windows = [int16(speech_like(length, seed)) for seed, length in enumerate((480_000, 200_000, 3000))]
    computed = features(windows, n_mels, dtype=torch.float16, frames_first=frames_first)
    assert torch.equal(computed, features(windows, n_mels).half())


@pytest.mark.parametrize("pairs", [4, 8, 32])
def test_other_tiles(pairs: int) -> None:
    windows = [speech_like(length, seed) for seed, length in enumerate((480_000, 10_241, 77))]
    for kind in ([int16(w) for w in windows], [w.float() for w in windows]):
        assert error(features(kind, pairs=pairs), kind) < TOLERANCE
        assert torch.equal(
            features(kind, pairs=pairs, dtype=torch.float16, frames_first=True), features(kind, pairs=pairs).half()
        )


def test_it_runs_in_a_cuda_graph() -> None:
    windows = [int16(speech_like(length, seed)) for seed, length in enumerate((480_000, 99_999))]
    samples, offsets, lengths = (t.to(DEVICE) for t in pack([w.cpu() for w in windows]))
    kernel = LogMelKernel(128, DEVICE)
    out = torch.empty(2, 128, FRAMES, device=DEVICE)
    kernel(samples, offsets, lengths, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(samples, offsets, lengths, out)
    samples.copy_(samples.flip(0))
    expected = kernel(samples, offsets, lengths)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_wrong_input_is_refused() -> None:
    kernel = LogMelKernel(80, DEVICE)
    samples = torch.zeros(1000, dtype=torch.int16, device=DEVICE)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lengths = torch.full((1,), 1000, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="pinned host memory"):
        kernel(samples.cpu(), offsets, lengths)
    with pytest.raises(ValueError, match="int16 or float32"):
        kernel(samples.double(), offsets, lengths)
    with pytest.raises(ValueError, match="offsets must be"):
        kernel(samples, offsets.int(), lengths)
    with pytest.raises(ValueError, match="float16 only"):
        kernel(samples, offsets, lengths, frames_first=True)
    with pytest.raises(ValueError, match="out must be"):
        kernel(samples, offsets, lengths, torch.empty(1, 3000, 80, device=DEVICE))
