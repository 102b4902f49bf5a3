"""Token identity: does the engine in FP32 choose the tokens that openai-whisper's ``decode`` chooses?

    python -m loadtest.identity --model embedded:base --batches 1 8 --json identity.json

Every window of the recordings (30 s each, the last of a recording shorter) is decoded greedily with timestamps by both,
from the same samples, with the same language and prompt: in recordings of several windows the text of the window before
(openai-whisper's) is the prompt. Ends with status 1 where fewer than 99.5 % are identical, 2 without recordings.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from whisper import log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions, decode
from whisper.model import ModelDimensions, Whisper

from loadtest import dataset, report
from loadtest.dataset import Recording
from serve_app.audio.decode import AudioDecoder
from serve_app.engine.checkpoint import Checkpoint, load
from serve_app.engine.constants import WINDOW_SAMPLES
from serve_app.engine.encoder import Encoder
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.settings import AudioSettings

GOAL = 0.995
CATEGORIES = ("en_short", "en_noisy", "en_spontaneous", "en_long", "synth_long", "multilingual")

Samples = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Expected:
    """A window, how it was decoded, and the tokens that openai-whisper chose for it."""

    name: str
    samples: Samples
    language: str
    prompt: str | None
    tokens: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    batch: int
    identical: int
    windows: int
    different: list[dict[str, str]]

    @property
    def share(self) -> float:
        return self.identical / self.windows


async def read_windows(recordings: Sequence[Recording]) -> list[list[Samples]]:
    """The recordings' samples, cut every 30 s."""
    async with AudioDecoder(AudioSettings()) as decoder:
        cut = []
        for recording in recordings:
            samples = np.concatenate([block async for block in decoder.decode(recording.path.read_bytes())])
            cut.append([samples[i : i + WINDOW_SAMPLES] for i in range(0, len(samples), WINDOW_SAMPLES)])
        return cut


@torch.no_grad()
def reference(checkpoint: Checkpoint, recordings: Sequence[Recording], cut: list[list[Samples]]) -> Iterator[Expected]:
    model = Whisper(ModelDimensions(**asdict(checkpoint.dims)))
    model.load_state_dict(checkpoint.tensors)
    model.float().eval()
    for recording, windows in zip(recordings, cut, strict=True):
        prompt = None
        language = recording.language or "en"
        for index, samples in enumerate(windows):
            mel = log_mel_spectrogram(pad_or_trim(samples.astype(np.float32) / 32768), checkpoint.dims.n_mels)
            result = decode(model, mel, DecodingOptions(fp16=False, language=language, prompt=prompt))
            assert not isinstance(result, list)
            yield Expected(f"{recording.file}#{index}", samples, language, prompt, result.tokens, result.text)
            prompt = result.text


def compare(checkpoint: Checkpoint, expected: Sequence[Expected], batch: int) -> Outcome:
    compute = Compute.resolve("cpu", "float32")
    log_mel, encoder = LogMel(checkpoint.dims.n_mels, compute), Encoder(checkpoint, compute)
    decoder = SlotDecoder(checkpoint, compute, batch)
    different = []
    batches = [expected[i : i + batch] for i in range(0, len(expected), batch)]
    for together in track(batches, f"batches of {batch}", console=Console(stderr=True)):
        states = encoder(log_mel([window.samples for window in together]))
        tasks = [
            SlotTask(window.name, state, DecodeOptions(language=window.language, prompt=window.prompt))
            for window, state in zip(together, states, strict=True)
        ]
        decoder.admit(tasks)
        done: dict[str, DecodedWindow] = {}
        while decoder.active:
            done.update(decoder.step())
        for window in together:
            if done[window.name].tokens != window.tokens:
                text = done[window.name].text
                different.append({"window": window.name, "openai-whisper": window.text, "whisper-serve": text})
    return Outcome(batch, len(expected) - len(different), len(expected), different)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dataset.add_argument(parser)
    parser.add_argument("--model", default="embedded:base", help="checkpoint (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (%(default)s)")
    parser.add_argument("--files", type=int, help="only so many recordings, spread over the set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    recordings, _ = dataset.load_or_exit(arguments.audio)
    torch.set_num_threads(arguments.threads)
    checkpoint = load(arguments.model)
    chosen = [r for r in dataset.select(recordings, *CATEGORIES) if checkpoint.dims.multilingual or r.language == "en"]
    if arguments.files is not None:
        chosen = chosen[:: max(1, len(chosen) // arguments.files)][: arguments.files]
    cut = asyncio.run(read_windows(chosen))
    began = time.monotonic()
    steps = track(
        reference(checkpoint, chosen, cut),
        "openai-whisper",
        total=sum(map(len, cut)),
        console=Console(stderr=True),
    )
    expected = list(steps)
    outcomes = [compare(checkpoint, expected, batch) for batch in arguments.batches]

    table = Table(
        "batch", "windows", "identical", "%", title=f"{checkpoint.name}: tokens beside openai-whisper's, FP32"
    )
    for outcome in outcomes:
        table.add_row(str(outcome.batch), str(outcome.windows), str(outcome.identical), f"{100 * outcome.share:.2f}")
    console = Console()
    console.print(table)
    for outcome in outcomes:
        for window in outcome.different:
            console.print(f"batch {outcome.batch}: {window}", highlight=False, markup=False)
    tokens = sum(len(window.tokens) for window in expected)
    console.print(f"{tokens} tokens, {time.monotonic() - began:.0f} s", highlight=False)
    if arguments.json is not None:
        runs = [asdict(outcome) | {"share": outcome.share} for outcome in outcomes]
        payload = {"environment": report.environment(), "model": checkpoint.name, "tokens": tokens, "runs": runs}
        report.write_json(arguments.json, payload)
    sys.exit(0 if all(outcome.share >= GOAL for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
