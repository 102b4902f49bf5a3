"""The engine's pieces on one GPU: the encoder, milliseconds a window, and a decoding step, milliseconds::

python -m loadtest.gpu.pieces --model large-v3 --json pieces.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from kernels.next_token import Field, new_state
from loadtest.gpu.engine import SLOTS, Engine
from loadtest.gpu.timing import milliseconds
from loadtest.gpu.work import MODELS, random_log_mel, random_weights

STEP_SIZES = (1, 8, 32, 64, 128, 256)
ENCODER_SIZES = (1, 16, 32)
MIDDLE = 64  # a step's position, as in the middle of 128 tokens
Row = dict[str, object]


@torch.inference_mode()
def measure(model: str) -> list[Row]:
    dims, device = MODELS[model], torch.device("cuda")
    engine = Engine()
    engine.load(dims, random_weights(dims, device, torch.float16), device)
    rows: list[Row] = []
    for batch in ENCODER_SIZES:
        log_mel = random_log_mel(batch, dims, device, torch.float16)
        ms = milliseconds(partial(engine.encoder, log_mel), repeats=10)
        rows.append({"piece": "encoder", "model": model, "windows": batch, "ms_a_window": ms / batch})
    states = engine.slots.states
    engine.slots.decoder.states.all.numbers.normal_()
    for size in STEP_SIZES:
        state = new_state([50258, 50259, 50360, 50364], position=MIDDLE, timestamps=True, temperature=0.0, seed=0)
        states[:size] = torch.tensor([state], dtype=torch.int32, device=device)
        if engine.slots.advance_few is not None and size <= engine.slots.decoder.few:
            ms = milliseconds(partial(engine.slots.advance_few, size))
        else:
            ms = milliseconds(partial(engine.slots.advance, size)) / engine.slots.steps
        states[:, Field.FINISHED] = 1
        rows.append({"piece": "step", "model": model, "slots": size, "of": SLOTS, "ms": ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="large-v3")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = measure(options.model)
    for row in rows:
        print(row)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
