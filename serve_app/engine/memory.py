"""GPU memory: what the stages need, and taking a share of it. Slots and batches bound it, not requests.

``number``: bytes of one number in the precision of the products, 2 for FP16.
"""

from __future__ import annotations

import logging
import time

import torch

from kernels import persistent_step
from serve_app.engine.checkpoint import Dims

logger = logging.getLogger(__name__)

GiB = 2**30
FEW = max(persistent_step.SLOTS)

CONTEXT_BYTES = 1 * GiB
"""Of a process on a GPU, whatever it computes: CUDA's context, the libraries' code and workspaces."""

MOST_SLOTS = 256
"""Beyond this the weights, which a step reads once for all slots, are a small part of what it reads."""

MOST_WINDOWS = 16
"""Of an encoder's batch: larger ones are hardly faster, are seldom full, and keep the GPU's other stages waiting for
longer."""

WAIT_S = 120.0
"""How long a starting replica waits for the memory of the one before it, whose process may still be ending."""


class OutOfShare(RuntimeError):
    """A stage does not fit its share of a GPU's memory; the message says what would."""


def decoder_bytes(dims: Dims, number: int, queued: int) -> int:
    """Of the decoder without slots: context, weights, and the states of as many windows as its queue holds, which have
    come over the GPU's memory."""
    d = dims.n_text_state
    ready = dims.n_text_layer * 2 * FEW * dims.n_audio_ctx * d  # keys and values of windows decoded alone
    weights = dims.n_text_layer * 16 * d * d + (dims.n_vocab + dims.n_text_ctx) * d
    return CONTEXT_BYTES + number * (weights + ready) + queued * state_bytes(dims, number)


def state_bytes(dims: Dims, number: int) -> int:
    """Of a window's encoder state."""
    return dims.n_audio_ctx * dims.n_audio_state * number


def features_of_window_bytes(dims: Dims, number: int) -> int:
    """Of a window's log-mel features."""
    return dims.n_mels * 2 * dims.n_audio_ctx * number


def slot_bytes(dims: Dims, number: int, state_bits: int = 16) -> int:
    """Of one slot: self-attention cache, encoder state, one that is on its way into the slot, logits. state_bits: 8
    where the slot's state is bytes with a scale for 64 of them."""
    cache = dims.n_text_layer * 2 * dims.n_text_ctx * dims.n_text_state * number
    arriving = state_bytes(dims, number)
    state = state_bytes(dims, 1) * 33 // 32 if state_bits == 8 else arriving
    return cache + state + arriving + 2 * dims.n_vocab * 4


def plan_slots(
    dims: Dims, number: int, share_bytes: int, queued: int, wanted: int | None = None, *, state_bits: int = 16
) -> int:
    """How many slots a decoder has in its share: those wanted, or as many as fit. OutOfShare where they do not fit."""
    fixed, each = decoder_bytes(dims, number, queued), slot_bytes(dims, number, state_bits)
    fit = (share_bytes - fixed) // each
    if fit < (wanted or 1):
        need = fixed + (wanted or 1) * each
        raise OutOfShare(
            f"a decoder with {wanted or 1} slots needs {need / GiB:.1f} GiB of GPU memory, its share is "
            f"{share_bytes / GiB:.1f} GiB: raise decoder.num_gpus or decoder.memory_gib, or lower decoder.slots or "
            "decoder.max_queued_windows"
        )
    return wanted or min(fit, MOST_SLOTS)


def encoder_bytes(dims: Dims, number: int, windows: int, ring_windows: int, queued: int) -> int:
    """Of an encoder with batches of so many windows, so many states waiting in its ring, and the features of as many
    windows as its queue holds."""
    d = dims.n_audio_state
    weights = number * (dims.n_audio_layer * 12 * d * d + 3 * d * d + 3 * dims.n_mels * d)
    # of each position: the residual stream in float32; and its normalised form, queries, keys and values, attention's
    # result, the perceptron's inside, the second convolution's input, the encoder's result with a copy of it; all of it
    # twice, for the graph of a full batch has memory of its own
    activations = 2 * windows * dims.n_audio_ctx * d * (4 + number * (1 + 3 + 1 + 4 + 2 + 2))
    waiting = ring_windows * state_bytes(dims, number) + queued * features_of_window_bytes(dims, number)
    return CONTEXT_BYTES + weights + activations + waiting


def plan_windows(
    dims: Dims, number: int, share_bytes: int, ring_windows: int, queued: int, wanted: int | None = None
) -> int:
    """How many windows an encoder's batch has in its share: those wanted, or as many as fit, a power of two. OutOfShare
    where they do not fit."""

    def need(windows: int) -> int:
        return encoder_bytes(dims, number, windows, ring_windows, queued)

    windows = wanted or MOST_WINDOWS
    while wanted is None and windows > 1 and need(windows) > share_bytes:
        windows //= 2
    if need(windows) > share_bytes:
        raise OutOfShare(
            f"an encoder with batches of {windows} windows needs {need(windows) / GiB:.1f} GiB of GPU memory, its "
            f"share is {share_bytes / GiB:.1f} GiB: raise encoder.num_gpus or encoder.memory_gib, or lower "
            "encoder.budget_windows, encoder.ring_windows or encoder.max_queued_windows"
        )
    return windows


def features_bytes(dims: Dims, number: int, windows: int, ring_windows: int) -> int:
    """Of a feature stage with batches of so many windows."""
    return CONTEXT_BYTES + (windows + ring_windows) * features_of_window_bytes(dims, number)


def share_of(device: torch.device, num_gpus: float, memory_gib: float | None) -> int:
    """A replica's share of its GPU's memory, bytes: what its settings say, or the share of the GPU that it reserves."""
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * min(1.0, num_gpus)) if memory_gib is None else int(memory_gib * GiB)


def take_share(device: torch.device, share_bytes: int, need_bytes: int, *, what: str) -> None:
    """Keeps this process within its share, and waits until what it needs is free. OutOfShare where it needs more than
    its share, or the memory does not come free."""
    if need_bytes > share_bytes:
        raise OutOfShare(
            f"{what} needs {need_bytes / GiB:.1f} GiB of GPU memory, its share is {share_bytes / GiB:.1f} GiB"
        )
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, share_bytes / total), device)
    give_up = time.monotonic() + WAIT_S
    while free < need_bytes - CONTEXT_BYTES:  # this process has its context by now
        if time.monotonic() > give_up:
            raise OutOfShare(
                f"{what} needs {need_bytes / GiB:.1f} GiB of GPU memory, but other processes leave {free / GiB:.1f} GiB"
            )
        logger.info("%s waits for GPU memory: %.1f GiB are free", what, free / GiB)
        time.sleep(0.5)
        free, _ = torch.cuda.mem_get_info(device)
