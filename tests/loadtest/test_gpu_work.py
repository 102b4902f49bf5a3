from __future__ import annotations

import math

import pytest
import torch

from loadtest.gpu.work import MODELS, NEW_TOKENS, Task, check_tokens, random_log_mel, random_weights
from serve_app.engine.checkpoint.form import tensor_shapes
from tests.engine.checkpoints import module
from tests.loadtest.gpu_systems import SMALL

CPU = torch.device("cpu")


@pytest.mark.parametrize(("model", "millions"), [("large-v3", 1543), ("turbo", 809)])
def test_the_models_have_the_sizes_of_the_published_ones(model: str, millions: int) -> None:
    parameters = sum(math.prod(shape) for shape in tensor_shapes(MODELS[model]).values())
    assert round(parameters / 1e6) == millions


def test_the_weights_are_those_of_openai_whispers_module_and_the_same_every_time() -> None:
    weights = random_weights(SMALL, CPU, torch.float16)
    state = module(SMALL).state_dict()
    assert weights.keys() == state.keys()
    assert all(weights[name].shape == state[name].shape for name in state)
    assert all(tensor.dtype == torch.float16 and bool(tensor.isfinite().all()) for tensor in weights.values())
    torch.testing.assert_close(
        weights["encoder.positional_embedding"].float(), state["encoder.positional_embedding"], atol=1e-3, rtol=0
    )
    again = random_weights(SMALL, CPU, torch.float16)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_windows_lie_in_the_range_of_log_mel_input_and_differ() -> None:
    log_mel = random_log_mel(2, SMALL, CPU, torch.float32)
    assert log_mel.shape == (2, 128, 3000)
    assert float(log_mel.min()) >= -1.0
    assert float(log_mel.max()) <= 1.5
    assert (log_mel[0].mean(dim=1) - log_mel[1].mean(dim=1)).abs().mean() > 0.1


def test_the_start_sequence_asks_for_english_transcription_without_timestamps() -> None:
    task = Task.of(SMALL)
    assert task.prompt == (50258, 50259, 50360, 50364)
    assert task.end == 50257
    assert task.end in task.suppressed


def test_work_that_was_not_done_is_found_out() -> None:
    task = Task.of(SMALL)
    done = torch.full((2, NEW_TOKENS), 1000)
    check_tokens(done, 2, task)
    for tokens, message in (
        (done[:, 1:], "shape"),
        (done[:1], "shape"),
        (done.float(), "not text"),
        (done.index_fill(1, torch.tensor([3]), task.end), "not text"),
        (done.index_fill(1, torch.tensor([3]), task.suppressed[0]), "suppressed"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tokens(tokens, 2, task)
