"""The decoder's input beside PyTorch's: ``python -m loadtest.gpu.kernels.embedding``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.embedding import embed
from loadtest.gpu.kernels import report
from loadtest.gpu.kernels.report import Row
from loadtest.gpu.timing import graph_milliseconds

TOKENS, POSITIONS = 51_866, 448
SETS = 16  # a step's launch is what costs, so more memory would change nothing


def measure(width: int = 1280, sizes: tuple[int, ...] = (1, 8, 64, 256)) -> list[Row]:
    """Milliseconds a step, for several numbers of slots."""
    token_table = torch.randn(TOKENS, width, device="cuda").half()
    position_table = torch.randn(POSITIONS, width, device="cuda")

    def library(tokens: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, token_table).float() + F.embedding(positions, position_table)

    rows: list[Row] = []
    for n in sizes:
        given = [(_random(n, TOKENS), _random(n, POSITIONS)) for _ in range(SETS)]
        rows.append(
            Row(
                "embedding",
                f"{n} × {width}",
                graph_milliseconds([partial(embed, token_table, position_table, *pair) for pair in given]),
                bytes=n * width * (2 + 4 + 4),
                library=graph_milliseconds([partial(library, *pair) for pair in given]),
            )
        )
    return rows


def _random(n: int, below: int) -> Tensor:
    return torch.randint(0, below, (n,), dtype=torch.int32, device="cuda")


if __name__ == "__main__":
    report.main(measure, __doc__)
