"""A decoding step of one or two windows in one kernel, beside the step of many::

python -m loadtest.gpu.kernels.persistent_step
"""

from __future__ import annotations

from functools import partial

import torch

from kernels.persistent_step import ENCODED, SLOTS, available
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds

MODELS = ("large-v3", "turbo")
POSITION = 64  # the middle of 128 tokens


def measure(models: tuple[str, ...] = MODELS) -> list[Row]:
    """Milliseconds a step, random weights. What it is compared with is no library's: it is the decoder's other way, a
    graph of many kernels, which more than two windows take. It is made for Hopper GPUs: no rows on others."""
    return [row for model in models for row in _rows(model)] if available(torch.device("cuda")) else []


def _rows(model: str) -> list[Row]:
    # the decoder brings much along that other benchmarks do without
    from loadtest.gpu import work
    from serve_app.engine.checkpoint import Checkpoint
    from serve_app.engine.decoder import Decoder
    from serve_app.engine.precision import Compute

    dims, device = work.MODELS[model], torch.device("cuda")
    weights = work.random_weights(dims, device, torch.float16)
    checkpoint = Checkpoint("random", dims, weights, alignment_heads=None, source="random")
    decoder = Decoder(checkpoint, Compute.resolve("cuda", "float16"), max(SLOTS))
    decoder.states.all.numbers.normal_()
    width, layers = dims.n_text_state, dims.n_text_layer
    rows: list[Row] = []
    for n in SLOTS:
        decoder.ready(n - 1)
        tokens = torch.arange(n, dtype=torch.int32, device=device)
        positions = torch.full_like(tokens, POSITION)
        read_once = layers * 14 * width**2 + dims.n_vocab * width
        read_by_a_slot = layers * 2 * (ENCODED + POSITION + 1) * width
        # a step goes through more memory than caches hold
        few, many = (partial(way, tokens, positions) for way in (decoder.step_few, decoder.step))
        rows.append(
            Row(
                f"persistent step, {model}",
                f"{n} slots",
                graph_milliseconds([few]),
                bytes=2 * (read_once + n * read_by_a_slot),
                library=graph_milliseconds([many]),
            )
        )
    return rows


if __name__ == "__main__":
    report.main(measure, __doc__)
