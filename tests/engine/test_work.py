"""The count of the engine's work, against PyTorch's own count of what the engine really runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loadtest.gpu.work import MODELS, random_weights
from serve_app.engine import work
from serve_app.engine.checkpoint import Checkpoint, Dims
from serve_app.engine.constants import WINDOW_SAMPLES
from serve_app.engine.encoder import Encoder
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.slots import SlotDecoder, SlotTask

SMALL = Dims(80, 1500, 128, 2, 2, 51865, 448, 128, 2, 2)
TINY = Dims(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4)


def counted(run: Callable[[], object]) -> float:
    """PyTorch's count, which knows attention by its products alone."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        run()
    return float(mode.get_total_flops())


def checkpoint(dims: Dims) -> Checkpoint:
    tensors = random_weights(dims, torch.device("cpu"), torch.float32)
    return Checkpoint("random", dims, tensors, alignment_heads=None, source="random")


@pytest.mark.parametrize("dims", [SMALL, TINY], ids=["small", "tiny"])
def test_the_encoder_does_what_is_counted(dims: Dims) -> None:
    encoder = Encoder(checkpoint(dims), Compute(torch.device("cpu"), torch.float32))
    assert counted(lambda: encoder(torch.zeros(2, dims.n_mels, 3000))) == pytest.approx(
        2 * work.encoder_operations(dims), rel=0.01
    )


@pytest.mark.parametrize("dims", [SMALL, TINY], ids=["small", "tiny"])
def test_a_decoding_step_does_what_is_counted(dims: Dims) -> None:
    slots = SlotDecoder(checkpoint(dims), Compute(torch.device("cpu"), torch.float32), 4)
    state = torch.randn(dims.n_audio_ctx, dims.n_audio_state)
    options = DecodeOptions(language="en", timestamps=False)
    slots.admit([SlotTask(str(i), state, options) for i in range(3)])
    slots.step()
    assert counted(slots.step) == pytest.approx(3 * work.step_operations(dims), rel=0.02)


def test_features_take_the_mel_filters_and_the_transform() -> None:
    dims = TINY
    log_mel = LogMel(dims.n_mels, Compute(torch.device("cpu"), torch.float32))
    filters = counted(lambda: log_mel([np.ones(WINDOW_SAMPLES, np.int16)]))  # PyTorch does not count the transform
    assert filters < work.features_operations(dims) < 3 * filters


def test_large_v3_is_what_is_known_of_it() -> None:
    """An encoder window takes 2.26 TFLOP, a step of a slot 8.1 GFLOP by the projections and the attention."""
    dims = MODELS["large-v3"]
    assert work.encoder_operations(dims) == pytest.approx(2.27e12, rel=0.01)
    d, layers = 1280, 32
    attention = layers * 4 * 20 * 1500 * d
    assert work.step_operations(dims) == pytest.approx(2 * layers * 16 * d * d + attention + 2 * d * 51866)
