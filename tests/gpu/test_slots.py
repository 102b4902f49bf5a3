"""In-flight batching on a GPU: windows that come and go, in gaps and on moved rows, write what they write alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loadtest.gpu.work import MODELS, random_weights
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.states import Bits
from serve_app.engine.tokens import Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WINDOWS, SLOTS, MOST_TOKENS = 24, 9, 40
DIMS = replace(
    MODELS["turbo"], n_audio_state=384, n_audio_head=6, n_text_state=384, n_text_head=6, n_text_layer=2, n_audio_layer=1
)


def decoder_of(compute: Compute, slots: int, state_bits: Bits = 16) -> SlotDecoder:
    weights = random_weights(DIMS, compute.device, compute.dtype)
    checkpoint = Checkpoint("random", DIMS, weights, alignment_heads=None, source="random")
    rules = rules_of(Tokens(DIMS).vocabulary, DIMS, MOST_TOKENS)
    return SlotDecoder(checkpoint, compute, slots, rules, state_bits=state_bits)


def task(name: int, state: Tensor) -> SlotTask:
    return SlotTask(str(name), state, DecodeOptions(language="en", timestamps=False, temperatures=(0.0,)))


@pytest.mark.parametrize(("dtype", "bits", "right"), [("float32", 16, 1.0), ("float16", 16, 0.9), ("float16", 8, 0.8)])
def test_windows_that_come_and_go_write_what_they_write_alone(dtype: str, bits: Bits, right: float) -> None:
    compute = Compute.resolve("cuda", dtype)
    generator = torch.Generator(compute.device).manual_seed(3)
    shape = WINDOWS, DIMS.n_audio_ctx, DIMS.n_audio_state
    states = torch.randn(shape, generator=generator, device=compute.device).to(compute.dtype)
    alone = decoder_of(compute, 1, bits)
    expected = []
    for i, state in enumerate(states):
        alone.admit([task(i, state)])
        while alone.active:
            expected += [window.tokens for _, window in alone.step()]
    assert len({tuple(tokens) for tokens in expected}) > WINDOWS // 2  # they differ

    decoder = decoder_of(compute, SLOTS, bits)
    waiting, cancelled = list(enumerate(states)), {"3", "11"}
    done: dict[str, list[int]] = {}
    began = step = gaps = 0
    while waiting or decoder.active:
        # some at a time, so that they end one after the other; from time to time nobody comes, and rows move
        if waiting and step % 3 == 0 and (step // 60) % 2 == 0:
            now, waiting = waiting[: min(2, decoder.free)], waiting[min(2, decoder.free) :]
            decoder.admit([task(i, state) for i, state in now])
            began += len(now)
        if began >= 12:
            decoder.cancel(cancelled)
        done |= {window_id: window.tokens for window_id, window in decoder.step()}
        gaps += decoder._rows[0] is None and decoder.active > 0
        step += 1
    done |= {window_id: window.tokens for window_id, window in decoder.read()}
    assert gaps > 0
    assert done.keys() | cancelled == {str(i) for i in range(WINDOWS)}
    same = [tokens == expected[int(i)] for i, tokens in done.items()]
    assert sum(same) >= right * len(same)
