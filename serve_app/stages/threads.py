"""CPU threads of a replica's engine."""

from __future__ import annotations

import os

import torch

MOST = 8
"""More threads than this gain little on one window's products."""


def default_threads() -> int:
    """Half of the cores, because encoder and decoder work at the same time.

    NOTES: threads beyond the cores are worse than fewer. OpenMP's barriers then wait for threads that the system has
    put aside, milliseconds at each of a step's products.
    """
    return max(1, min(MOST, len(os.sched_getaffinity(0)) // 2))


def use_threads(threads: int | None) -> None:
    """Sets PyTorch's threads in this process."""
    torch.set_num_threads(threads or default_threads())
