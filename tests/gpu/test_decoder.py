"""The decoder's two ways of a step on a GPU, beside the decoder in float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.persistent_step import SLOTS, WIDTHS, available
from loadtest.gpu.work import MODELS, random_weights
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.decoder import Decoder
from serve_app.engine.precision import Compute
from serve_app.engine.states import Bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def checkpoint(width: int, vocabulary: int, layers: int = 2) -> Checkpoint:
    """Random weights."""
    heads = width // 64
    dims = replace(
        MODELS["turbo"],
        n_audio_state=width,
        n_text_state=width,
        n_audio_head=heads,
        n_text_head=heads,
        n_audio_layer=1,
        n_text_layer=layers,
        n_vocab=vocabulary,
    )
    weights = random_weights(dims, torch.device("cpu"), torch.float16)
    return Checkpoint("random", dims, weights, alignment_heads=None, source="random")


@pytest.mark.parametrize("vocabulary", [51864, 51865, 51866])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [*SLOTS, 5])
@pytest.mark.parametrize("bits", [16, 8])
def test_steps_have_the_logits_of_float32(width: int, n: int, vocabulary: int, bits: Bits) -> None:
    if vocabulary != 51866 and (width != 384 or bits == 8):
        pytest.skip("one width for the other vocabularies")
    made = checkpoint(width, vocabulary)
    exact = Decoder(made, Compute.resolve("cpu", "float32"), n)
    decoder = Decoder(made, Compute.resolve("cuda", "float16"), n, bits)
    generator = torch.Generator().manual_seed(n)
    for slot in range(n):
        state = torch.randn(1500, width, generator=generator).half()
        exact.load([slot], [state.float()])
        decoder.load([slot], [state.cuda()])
        if slot < decoder.few:
            decoder.ready(slot)
    ways = [decoder.step, decoder.step_few] if n <= decoder.few else [decoder.step]
    lengths = torch.arange(n, dtype=torch.int32)  # slots at different places
    for slot in range(1, n):
        exact.prefill(slot, list(range(slot)))
        decoder.prefill(slot, list(range(slot)))
    for step in range(70):  # past the first positions that a group of lanes takes together
        tokens = torch.randint(0, 50000, (n,), generator=generator, dtype=torch.int32)
        positions = lengths + step
        expected = exact.step(tokens, positions)
        for way in ways:
            logits = way(tokens.cuda(), positions.cuda())
            assert logits.shape == (n, vocabulary)
            error = (logits.cpu() - expected).norm() / expected.norm()
            assert float(error) < (5e-3 if bits == 16 else 1e-2), (way.__name__, step)


def test_the_last_position_of_the_context() -> None:
    made = checkpoint(384, 51866)
    exact, decoder = (Decoder(made, Compute.resolve(*where), 1) for where in (("cpu", "float32"), ("cuda", "float16")))
    state = torch.randn(1500, 384, generator=torch.Generator().manual_seed(1)).half()
    exact.load([0], [state.float()])
    decoder.load([0], [state.cuda()])
    decoder.ready(0)
    exact.prefill(0, list(range(447)))
    decoder.prefill(0, list(range(447)))
    for position in (447, 448):  # the second is that of a slot whose context is full
        tokens, positions = torch.tensor([7], dtype=torch.int32), torch.tensor([position], dtype=torch.int32)
        expected = exact.step(tokens, positions)
        for way in (decoder.step, decoder.step_few):
            logits = way(tokens.cuda(), positions.cuda()).cpu()
            assert float((logits - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("width", [384, 1280])
@pytest.mark.parametrize("layers", [1, 2, 3])  # in an odd number of them, words between blocks end with other bits
def test_steps_of_one_kernel_in_a_graph_have_the_same_bits_each_time(width: int, layers: int) -> None:
    if not available(torch.device("cuda")):
        pytest.skip("made for Hopper GPUs")
    decoders = [Decoder(checkpoint(width, 51866, layers), Compute.resolve("cuda", "float16"), 2) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for decoder in decoders:
        for slot in range(2):
            decoder.load([slot], [torch.randn(1500, width, generator=generator).half().cuda()])
            decoder.ready(slot)
    tokens = torch.tensor([7, 8], dtype=torch.int32).cuda()
    positions = torch.tensor([0, 3], dtype=torch.int32).cuda()

    def steps() -> list[torch.Tensor]:
        """Of both decoders and both numbers of slots, in turns."""
        return [d.step_few(tokens[:n], positions[:n]) for _ in range(3) for n in SLOTS for d in decoders]

    first = steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = steps()
    for turn in range(100):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(logits, first, strict=True)), turn
    assert all(torch.equal(a, b) for a, b in zip(first[:4], first[4:8], strict=True))
