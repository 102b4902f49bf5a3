"""The choice of the next tokens beside plain PyTorch's: ``python -m loadtest.gpu.kernels.next_token``."""

from __future__ import annotations

import torch

from kernels.next_token import Field, NextToken, Rules, new_state
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import Run, graph_milliseconds, milliseconds, turns

RULES = Rules(
    n_vocab=51_866,
    end=50_257,
    no_speech=50_363,
    no_timestamps=50_364,
    timestamp_begin=50_365,
    blank_first=220,
    blank_second=50_257,
    language_begin=50_259,
    language_end=50_359,
    most_initial_timestamp=50,
    most_sampled=224,
    n_ctx=448,
    suppressed=tuple(range(50_258, 50_364)),
)
"""large-v3's, but that of the suppressed tokens only the special ones are there: their number costs nothing."""

SIZES = (1, 8, 64, 256)
SAMPLED = 10  # tokens so far: neither the first, which has rules of its own, nor the last


def measure(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Milliseconds a step, for several numbers of slots, with timestamps: the likeliest tokens, and samples."""
    return [row for n in sizes for row in (_row(n, 0.0), _row(n, 0.7))]


def _row(n: int, temperature: float) -> Row:
    device = torch.device("cuda")
    size = n * RULES.n_vocab * 4
    sets = turns(size, most=64)
    logits = torch.randn(sets, n, RULES.n_vocab, device=device) * 3
    choose = NextToken(RULES, device, n)
    begun = torch.tensor(_middle(temperature), dtype=torch.int32, device=device).expand(sets, n, -1).contiguous()
    states = begun.clone()

    def step(i: int) -> Run:
        def run() -> None:
            if i == 0:  # a step moves the states on, and what is finished costs nothing
                states.copy_(begun)
            choose(logits[i], states[i])

        return run

    def plain() -> None:
        states[0].copy_(begun[0])
        choose.reference(logits[0], states[0])

    greedy = temperature == 0
    return Row(
        f"next token, {'greedy' if greedy else 'sampled'}",
        f"{n} × {RULES.n_vocab}",
        graph_milliseconds([step(i) for i in range(sets)]),
        bytes=size,
        # plain PyTorch samples row by row, by Python's own loop: no measure of anything
        library=milliseconds(plain) if greedy else None,
    )


def _middle(temperature: float) -> list[int]:
    """A slot in the middle of its window, after text."""
    start = (50_258, 50_259, 50_360)
    state = new_state(start, position=0, timestamps=True, temperature=temperature, seed=1)
    state[Field.STEP] = state[Field.POSITION] = len(start) - 1 + SAMPLED
    state[Field.SAMPLED], state[Field.TOKEN] = SAMPLED, 1000
    state[Field.BEFORE_IS_TIMESTAMP] = 0
    state[Field.LAST_TIMESTAMP] = 0
    return state


if __name__ == "__main__":
    report.main(measure, __doc__)
