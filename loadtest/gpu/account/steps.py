"""A decoding step with its CUDA Graph, and launched kernel by kernel."""

from __future__ import annotations

from functools import partial

import torch

from kernels.next_token import Field, new_state
from loadtest.gpu.account.comparison import Comparison, Setting, engine_of, stream_milliseconds
from loadtest.gpu.work import Task

STEP_SIZES = (1, 32, 256)
MIDDLE = 64  # a step's position, as in the middle of 128 tokens


@torch.inference_mode()
def graphs(setting: Setting) -> list[Comparison]:
    """On a CPU there are no graphs: both are the same then."""
    device, dims = torch.device(setting.device), setting.dims
    engine = engine_of(setting)
    slots = engine.slots
    slots.decoder.states.all.numbers.normal_()
    state = new_state(Task.of(dims).prompt, position=MIDDLE, timestamps=False, temperature=0.0, seed=0)
    rows = []
    for size in STEP_SIZES:
        taken = []
        for step in (slots.advance, slots._advance):
            slots.states[:size] = torch.tensor([state], dtype=torch.int32, device=device)
            taken.append(stream_milliseconds(partial(step, size), device) / slots.steps)
            slots.states[:, Field.FINISHED] = 1
        what = f"decoding step of {size} slots, one graph"
        rows.append(Comparison("graphs", what, "kernel by kernel", "ms", taken[0], taken[1]))
    return rows
