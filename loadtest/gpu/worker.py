"""One system and one model, measured in a process of its own, so that a crash or a hang ends nothing else::

    python -m loadtest.gpu.worker EVENTS < job.json

EVENTS gets one JSON object a line as soon as it is known: ``loaded``, then for each batch size ``size``, ``failed`` or
``skipped``. What a process that ended early had already measured is thus kept.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadtest.gpu.work import System, Task, check_tokens, random_log_mel, random_weights
from serve_app.engine.checkpoint import Dims

TOKENS_OF = 4  # windows whose tokens are kept, for comparison

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """system: import path ``module:Class``. batches: ascending. alone_repeats and repeats: timed runs of one window
    alone and of larger batches. seconds: no size is begun that would probably end later than this."""

    system: str
    dims: Dims
    batches: tuple[int, ...]
    alone_repeats: int = 3
    repeats: int = 1
    seconds: float = 600.0
    device: str = "cuda"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**fields | {"dims": Dims(**fields["dims"]), "batches": tuple(fields["batches"])})


def make(path: str) -> System:
    module, _, name = path.partition(":")
    system: System = getattr(import_module(module), name)()
    return system


def measure(job: Job, emit: Emit) -> None:
    """Every size in turn, until memory runs out, throughput has fallen twice, or time is up."""
    begin = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(job.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    system, task = make(job.system), Task.of(job.dims)
    weights = random_weights(job.dims, device, dtype)
    system.load(job.dims, weights, device)
    del weights
    log_mel = random_log_mel(max(job.batches), job.dims, device, dtype)
    _free(device)
    emit({"event": "loaded", "name": system.name, "load_s": time.monotonic() - begin})

    rates: list[float] = []
    least_s = 0.0
    for at, batch in enumerate(job.batches):
        if reason := reason_to_stop(rates, least_s, job.seconds - (time.monotonic() - begin)):
            for left in job.batches[at:]:
                emit({"event": "skipped", "batch": left, "reason": reason})
            return
        try:
            size = _time(system, log_mel[:batch], task, job.alone_repeats if batch == 1 else job.repeats)
        except Exception as error:
            emit({"event": "failed", "batch": batch, "reason": f"{type(error).__name__}: {error}"[:500]})
            if out_of_memory(error):
                return
        else:
            emit({"event": "size", "batch": batch, **size})
            median_s = statistics.median(size["seconds"])
            rates.append(batch / median_s)
            least_s = (1 + job.repeats) * median_s
        _free(device)


def _time(system: System, log_mel: Tensor, task: Task, repeats: int) -> dict[str, Any]:
    seconds, tokens = [], torch.empty(0)
    begin = time.perf_counter()
    system.run(log_mel)
    _synchronize(log_mel.device)
    warm_up_s = time.perf_counter() - begin
    for _ in range(repeats):
        begin = time.perf_counter()
        tokens = system.run(log_mel)
        _synchronize(log_mel.device)
        seconds.append(time.perf_counter() - begin)
        check_tokens(tokens, len(log_mel), task)
    memory = _memory_gib(log_mel.device)
    kept = [" ".join(map(str, window)) for window in tokens[:TOKENS_OF].tolist()]
    return {"seconds": seconds, "warm_up_s": warm_up_s, "memory_gib": memory, "tokens": kept}


def reason_to_stop(rates: Sequence[float], least_s: float, seconds_left: float) -> str | None:
    """Why no further size is to be begun, or None (pure). rates: windows a second at the sizes so far; least_s: what
    the next would take if it ran as long as the one before, which it will hardly undercut."""
    if has_fallen_twice(rates):
        return "throughput fell twice"
    if least_s > seconds_left:
        return f"at least {least_s:.0f} s wanted, {max(0.0, seconds_left):.0f} s left"
    return None


def has_fallen_twice(rates: Sequence[float]) -> bool:
    """Were the last two sizes both slower than the best before them? (pure)"""
    return len(rates) > 2 and max(rates[-2:]) < max(rates[:-2])


def out_of_memory(error: Exception) -> bool:
    """PyTorch's own error, and what CTranslate2 and cuBLAS say when an allocation fails."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_gib(device: torch.device) -> float | None:
    """Device memory in use, whoever allocated it."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / 2**30, 1)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    with Path(sys.argv[1]).open("a", buffering=1) as events:
        job = Job.from_json(sys.stdin.read())
        measure(job, lambda event: print(json.dumps(event), file=events))


if __name__ == "__main__":
    main()
