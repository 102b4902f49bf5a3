from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loadtest.gpu.peers.ctranslate2 import CTranslate2, write_folder
from loadtest.gpu.peers.huggingface import Transformers, TransformersStatic
from loadtest.gpu.peers.openai_whisper import OpenAIWhisper
from loadtest.gpu.work import System, Task, check_tokens, random_log_mel, random_weights
from serve_app.engine.checkpoint import load
from tests.engine.checkpoints import same
from tests.loadtest.gpu_systems import SMALL

CPU = torch.device("cpu")
WINDOWS = 3


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SMALL, CPU, torch.float32)


@pytest.fixture(scope="module")
def log_mel() -> Tensor:
    return random_log_mel(WINDOWS, SMALL, CPU, torch.float32)


def tokens_of(system: System, weights: dict[str, Tensor], log_mel: Tensor) -> Tensor:
    system.load(SMALL, weights, CPU)
    tokens = system.run(log_mel)
    check_tokens(tokens, WINDOWS, Task.of(SMALL))
    return tokens


@pytest.fixture(scope="module")
def expected(weights: dict[str, Tensor], log_mel: Tensor) -> Tensor:
    return tokens_of(OpenAIWhisper(), weights, log_mel)


def test_what_a_window_becomes_depends_on_its_sound_and_goes_on_changing(expected: Tensor) -> None:
    assert len({tuple(window) for window in expected.tolist()}) == WINDOWS
    assert all(len(window.unique()) > 10 for window in expected)


def test_ctranslate2_chooses_openai_whispers_tokens(
    weights: dict[str, Tensor], log_mel: Tensor, expected: Tensor
) -> None:
    assert torch.equal(tokens_of(CTranslate2(), weights, log_mel), expected)


@pytest.mark.parametrize("kind", [Transformers, TransformersStatic])
def test_transformers_chooses_openai_whispers_tokens(
    kind: type[Transformers], weights: dict[str, Tensor], log_mel: Tensor, expected: Tensor
) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    assert torch.equal(tokens_of(kind(), weights, log_mel), expected)


def test_the_ctranslate2_folder_reads_back_as_the_weights_it_was_made_of(tmp_path: Path) -> None:
    weights = random_weights(SMALL, CPU, torch.float16)
    write_folder(tmp_path, SMALL, weights)
    checkpoint = load(str(tmp_path))
    assert checkpoint.dims == SMALL
    assert same(checkpoint.tensors, weights)
