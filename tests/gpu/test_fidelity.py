"""The engine's FP16 tokens beside openai-whisper's FP32, as ``loadtest.gpu.fidelity`` counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadtest.dataset import Recording
from loadtest.gpu.fidelity.__main__ import compare
from serve_app.engine.checkpoint import load
from tests.engine.conftest import SAMPLE, read_pcm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_float16_makes_hardly_a_mistake_and_only_near_ties() -> None:
    speech = read_pcm(SAMPLE)
    cut = [[speech[i : i + 80_000] for i in range(0, len(speech) - 40_000, 40_000)]]
    recording = Recording(Path("sample"), "sample", len(speech) / 16_000, "en", "", "", "en_short", True)
    outcome = compare(load("embedded:tiny.en"), [recording], cut, torch.device("cuda"), slots=4)
    for system in (outcome.ours, outcome.theirs):
        assert system.positions > 40
        assert system.forced_share > 0.97, system.mistakes
        assert all(margin < 0.25 for margin in system.margins), system.mistakes
