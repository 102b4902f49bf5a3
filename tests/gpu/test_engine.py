"""The engine on an NVIDIA GPU, in plain PyTorch, beside openai-whisper and beside itself on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from whisper.decoding import DecodingOptions, decode

from serve_app.engine.checkpoint import Checkpoint, load
from serve_app.engine.encoder import Encoder
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.slots import SlotDecoder, SlotTask
from tests.engine.conftest import SAMPLE, read_pcm, reference_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return load("embedded:tiny.en")


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    speech = read_pcm(SAMPLE)
    rng = np.random.default_rng(7)
    starts, lengths = rng.integers(0, len(speech) // 2, 16), rng.integers(48_000, 160_000, 16)
    return [speech[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def tokens(checkpoint: Checkpoint, windows: list[np.ndarray], compute: Compute, slots: int) -> list[list[int]]:
    """What the engine chooses for the windows, entering slots as they come free."""
    states = Encoder(checkpoint, compute)(LogMel(checkpoint.dims.n_mels, compute)(windows))
    decoder = SlotDecoder(checkpoint, compute, slots)
    waiting = [SlotTask(str(i), state, DecodeOptions(language="en")) for i, state in enumerate(states)]
    done: dict[str, list[int]] = {}
    while waiting or decoder.active:
        now, waiting = waiting[: decoder.free], waiting[decoder.free :]
        decoder.admit(now)
        done |= {window_id: result.tokens for window_id, result in decoder.step()}
    return [done[str(i)] for i in range(len(windows))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 2e-3)])
def test_features_equal_those_of_the_cpu(dtype: str, tolerance: float, windows: list[np.ndarray]) -> None:
    computed = LogMel(80, Compute.resolve("cuda", dtype))(windows).cpu().float()
    torch.testing.assert_close(computed, LogMel(80, Compute.resolve("cpu", "float32"))(windows), rtol=0, atol=tolerance)


@pytest.mark.parametrize("slots", [1, 8])
def test_float32_chooses_openai_whispers_tokens(slots: int, tiny: Checkpoint, windows: list[np.ndarray]) -> None:
    compute = Compute.resolve("cuda", "float32")
    model = reference_model(tiny).cuda()
    mel = LogMel(80, compute)(windows)
    with torch.no_grad():
        expected = [r.tokens for r in decode(model, mel, DecodingOptions(fp16=False, language="en"))]
    assert tokens(tiny, windows, compute, slots) == expected


def test_float16_chooses_float32s_tokens_but_for_ties(tiny: Checkpoint, windows: list[np.ndarray]) -> None:
    exact = tokens(tiny, windows, Compute.resolve("cuda", "float32"), 8)
    half = tokens(tiny, windows, Compute.resolve("cuda", "float16"), 8)
    assert sum(a == b for a, b in zip(exact, half, strict=True)) >= 0.8 * len(windows)


def test_batches_that_are_graphs_give_what_others_give(tiny: Checkpoint, windows: list[np.ndarray]) -> None:
    compute = Compute.resolve("cuda", "float16")
    log_mel = LogMel(80, compute)(windows)
    graphed, plain = Encoder(tiny, compute, full=16), Encoder(tiny, compute)
    for batch in (log_mel, log_mel.flip(0), log_mel[:7], log_mel[:3]):  # full, again, between, small
        expected = torch.cat([plain(half) for half in batch.split(8)]).float()
        assert float((graphed(batch).float() - expected).norm() / expected.norm()) < 1e-3
