"""The decoder's whole step in plain PyTorch, beside the decoder's own."""

from __future__ import annotations

import torch

from kernels.persistent_step import ENCODED, HEAD, reference
from serve_app.engine.decoder import Decoder
from serve_app.engine.precision import Compute
from tests.engine.test_work import SMALL, checkpoint


@torch.inference_mode()
def test_it_is_the_decoders_step() -> None:
    decoder = Decoder(checkpoint(SMALL), Compute.resolve("cpu", "float32"), 2)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(ENCODED, SMALL.n_text_state, generator=generator) for _ in range(2)]
    decoder.load(range(2), states)
    decoder.prefill(1, [50258, 7, 8])
    layers = []
    for block in decoder.blocks:
        keys, values = (torch.zeros(2, SMALL.n_text_head, ENCODED, HEAD) for _ in range(2))
        for slot, state in enumerate(states):
            block.cross_attention.ready(state, keys[slot], values[slot])
        layers.append(block.tensors(keys, values))
    tokens, positions = torch.tensor([5, 6], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    expected = decoder.step(tokens, positions)
    tables = decoder.embedding[: SMALL.n_vocab], decoder.positions, decoder.norm.weight, decoder.norm.bias
    torch.testing.assert_close(reference(layers, *tables, tokens, positions), expected, rtol=1e-4, atol=1e-4)
