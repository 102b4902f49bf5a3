"""How input gets to the GPU: read in mapped host memory, copied before it is needed, or meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.log_mel import WINDOW_SAMPLES, LogMelKernel, pack
from loadtest.gpu.account.comparison import Comparison, Setting, engine_of, need_gpu, stream_milliseconds
from loadtest.gpu.timing import graph_milliseconds
from loadtest.gpu.work import random_log_mel

LOG_MEL_WINDOWS = 64
BATCHES = 6  # one after the other, to be buffered


def mapped(setting: Setting) -> list[Comparison]:
    need_gpu(setting)
    device = torch.device(setting.device)
    kernel = LogMelKernel(setting.dims.n_mels, device)
    samples, offsets, lengths = pack(_noise(), pin_memory=True)
    offsets, lengths = offsets.to(device), lengths.to(device)
    out = kernel(samples, offsets, lengths, dtype=torch.float16)
    copied = torch.empty_like(samples, device=device)

    def in_place() -> None:
        kernel(samples, offsets, lengths, out, dtype=torch.float16)

    def staged() -> None:
        copied.copy_(samples, non_blocking=True)
        kernel(copied, offsets, lengths, out, dtype=torch.float16)

    what = f"log-mel of {LOG_MEL_WINDOWS} windows from mapped host memory"
    ours, other = (graph_milliseconds([work]) for work in (in_place, staged))
    return [Comparison("mapped", what, "copied first", "ms", ours, other)]


@torch.inference_mode()
def buffering(setting: Setting) -> list[Comparison]:
    need_gpu(setting)
    device, dims = torch.device(setting.device), setting.dims
    encoder = engine_of(setting).encoder
    rows = []
    for windows in (1, 16):
        log_mel = random_log_mel(windows, dims, device, torch.float16).cpu()
        rows.append(_buffered(f"encoder, batches of {windows}", log_mel, encoder, device))
    kernel = LogMelKernel(dims.n_mels, device)
    samples, offsets, lengths = pack(_noise())
    offsets, lengths = offsets.to(device), lengths.to(device)
    out = torch.empty(LOG_MEL_WINDOWS, dims.n_mels, 3000, device=device)

    def log_mel_kernel(given: Tensor) -> Tensor:
        return kernel(given, offsets, lengths, out)

    rows.append(_buffered(f"log-mel, batches of {LOG_MEL_WINDOWS}", samples, log_mel_kernel, device))
    return rows


def _buffered(what: str, batch: Tensor, compute: Callable[[Tensor], Tensor], device: torch.device) -> Comparison:
    pinned = [batch.pin_memory() for _ in range(BATCHES)]
    buffers = [torch.empty_like(batch, device=device) for _ in range(2)]
    upload = torch.cuda.Stream()
    ours, other = (
        stream_milliseconds(partial(work, pinned, buffers, compute), device) / BATCHES
        for work in (partial(uploaded_meanwhile, upload), uploaded_before)
    )
    return Comparison("buffering", f"{what}, the next uploaded meanwhile", "uploaded before", "ms a batch", ours, other)


def uploaded_before(
    batches: Sequence[Tensor], buffers: Sequence[Tensor], compute: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Each batch is copied to the GPU, then computed."""
    return [compute(buffers[0].copy_(batch, non_blocking=True)) for batch in batches]


def uploaded_meanwhile(
    upload: torch.cuda.Stream,
    batches: Sequence[Tensor],
    buffers: Sequence[Tensor],
    compute: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The copies go through two buffers on a stream of their own, one batch ahead of the computation."""
    here, results = torch.cuda.current_stream(), []
    done: list[torch.cuda.Event] = []
    upload.wait_stream(here)
    for index, batch in enumerate(batches):
        buffer = buffers[index % 2]
        if index >= 2:
            upload.wait_event(done[index - 2])  # who computed with this buffer before
        with torch.cuda.stream(upload):
            buffer.copy_(batch, non_blocking=True)
        here.wait_stream(upload)
        results.append(compute(buffer))
        done.append(here.record_event())
    return results


def _noise() -> list[Tensor]:
    """Windows of 30 s, int16."""
    return list((torch.randn(LOG_MEL_WINDOWS, WINDOW_SAMPLES) * 3000).to(torch.int16))
