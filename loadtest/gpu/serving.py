"""The work of ``loadtest.gpu`` through the product on one GPU: samples in, text out, beside the engine by itself::

    python -m loadtest.gpu.serving --model large-v3 --windows 4096 --concurrency 768 --json serving.json

Starts the application with its defaults, but for a latency objective that so long a queue can meet: within two seconds
slots would be given up for latency, and throughput is the question here. A replica of each stage is on the GPU, besides
several API replicas. Windows are recordings of just 30 s, of speech, since voice activity lets nothing else pass; they
come through the Ray handle as 16-bit samples, then over HTTP as WAV files (with ``RAY_SERVE_ENABLE_HA_PROXY=1`` behind
HAProxy). Each takes 128 tokens, of which one is the opening timestamp: ``decoder.max_tokens`` ends it there, and the
weights never end it before. The engine by itself (``loadtest.gpu.engine``, log-mel input that lies on the GPU, no HTTP,
no Ray) is measured before, in a process of its own. CPU time of the parts is read from /proc; that of voice activity,
which runs in the API replicas, is measured alone.

Ends with status 1 where the handle reaches less than 0.9 of the engine's throughput, or windows were other work.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loadtest import processes, report
from loadtest.gpu import clients
from loadtest.gpu.clients import Answer, Load, Samples, Way
from loadtest.gpu.engine import SLOTS
from loadtest.gpu.run import SYSTEMS, Run, Size, run
from loadtest.gpu.work import MODELS, NEW_TOKENS, SEED, WINDOW_S, random_weights
from loadtest.gpu.worker import Job
from loadtest.recording import REPORT_MS, REPORT_VARIABLE, SETTLE_S, Recorder, targets
from loadtest.server import free_port
from serve_app.audio.decode import AudioDecoder
from serve_app.audio.pipeline import PORTION_SAMPLES
from serve_app.audio.vad import TOGETHER, SpeechDetector
from serve_app.engine.checkpoint import Dims
from serve_app.running import running
from serve_app.settings import AudioSettings, Settings

GOAL = 0.9
WAYS: tuple[Way, ...] = ("handle", "http")
SAMPLE = Path(__file__).resolve().parents[2] / "serve_app" / "assets" / "sample.flac"
RECORDINGS = 64
ENGINE_SECONDS = 240.0
OBJECTIVE_S = 30.0

SURE = 16.0
"""The last norm's factor: the same tokens, but sure of them, so that no window is taken for a doubtful one."""
LOUD_POSITIONS = 16.0
"""That of the decoder's positions: without it the text repeats itself, and windows would be decoded again for that."""

API = "api"
AUDIO = "audio decoding"
STAGES = ("features", "encoder", "decoder")
PROXY = "Serve's proxy"
RAY = "Ray besides"
CLIENTS = "the clients here"
PARTS = (API, AUDIO, *STAGES, PROXY, RAY, CLIENTS)


@dataclass(frozen=True, slots=True)
class Measured:
    """One way through the product. other_work: windows that took other than 128 tokens, or were decoded again.
    cpu_s: by part. steady_rtfx: while as many windows were under way as there can be, without the beginning, in which
    the slots fill, and the end, in which they empty; None where the run was too short."""

    way: Way
    windows: int
    wall_s: float
    other_work: int
    cpu_s: dict[str, float]
    steady_rtfx: float | None = None

    @property
    def audio_s(self) -> float:
        return self.windows * WINDOW_S

    @property
    def rtfx(self) -> float:
        return self.audio_s / self.wall_s

    def an_hour(self, part: str) -> float:
        """CPU seconds of a part for an hour of audio."""
        return self.cpu_s[part] * 3600 / self.audio_s

    def cores(self, part: str) -> float:
        """That it kept busy."""
        return self.cpu_s[part] / self.wall_s


class MeasurementFailed(Exception):
    """Windows were not transcribed."""


# ---- what is sent ----


def speakable_weights(dims: Dims) -> dict[str, Tensor]:
    """``random_weights`` with which a window passes the product's checks of its text, as speech does with real ones."""
    weights = random_weights(dims, torch.device("cpu"), torch.float16)
    for name in ("weight", "bias"):
        weights[f"decoder.ln.{name}"] *= SURE
    weights["decoder.positional_embedding"] *= LOUD_POSITIONS
    return weights


def write_checkpoint(dims: Dims, path: Path) -> None:
    """In OpenAI's format."""
    torch.save({"dims": asdict(dims), "model_state_dict": speakable_weights(dims)}, path)


def speech_windows(count: int) -> Samples:
    """Recordings of 30 s, all different: the bundled sample from another beginning, over and over, louder or softer,
    with noise. int16 [count, 480000]."""
    speech = asyncio.run(_decode(SAMPLE.read_bytes()))
    generator = np.random.default_rng(SEED)
    length = round(WINDOW_S * clients.RATE)
    windows = np.empty((count, length), np.int16)
    for window in windows:
        turned = np.resize(np.roll(speech, int(generator.integers(len(speech)))), length) * generator.uniform(0.4, 1.0)
        window[:] = (turned + generator.normal(0, 50, length)).clip(-32768, 32767)
    return windows


async def _decode(file: bytes) -> Samples:
    async with AudioDecoder(AudioSettings()) as decoder:
        return np.concatenate([block async for block in decoder.decode(file)])


# ---- what it costs ----


def part_of(title: str) -> str:
    """Which part of the product a process is, by its title (pure)."""
    if "serve_app.audio.sandbox" in title:
        return AUDIO
    if replica := re.match(r"ray::ServeReplica:[^:]*:(\w+)", title):
        return replica[1]
    if title.startswith("ray::ProxyActor") or "haproxy" in title:
        return PROXY
    return (
        RAY if re.match(r"ray::", title) or re.search(r"/ray/(core|_private|dashboard|autoscaler)/", title) else CLIENTS
    )


def cpu_seconds() -> dict[str, float]:
    """CPU time so far, by part, of this process and all below it."""
    spent = dict.fromkeys(PARTS, 0.0)
    for process in processes.tree(os.getpid()):
        seconds = processes.cpu_seconds(process.pid)
        if seconds is not None:
            spent[part_of(processes.title(process.pid))] += seconds
    return spent


def voice_activity_seconds(recordings: Samples) -> float:
    """CPU seconds of voice activity for an hour of audio, as the product computes it where some recordings wait at the
    same time, one thread to a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        detector = SpeechDetector()
        detector.stream().push(recordings[0]).result()
        begin = time.process_time()
        for first in range(0, len(recordings), TOGETHER):
            group = [(detector.stream(), recording) for recording in recordings[first : first + TOGETHER]]
            for at in range(0, recordings.shape[1], PORTION_SAMPLES):
                for result in [stream.push(recording[at : at + PORTION_SAMPLES]) for stream, recording in group]:
                    result.result()
        return (time.process_time() - begin) * 3600 / (recordings.size / clients.RATE)
    finally:
        torch.set_num_threads(threads)


# ---- the measurement ----


def settings_for(checkpoint: Path, options: argparse.Namespace, port: int) -> Settings:
    """The product's defaults, but for what the work asks for. The environment can set others."""
    return Settings.model_validate(
        {
            "model": {"source": str(checkpoint), "device": options.device},
            "decoder": {"max_tokens": NEW_TOKENS},
            "request": {"max_active": max(256, options.concurrency)},
            "feedback": {"latency_objective_s": OBJECTIVE_S},
            "http": {"port": port, "replicas": options.api_replicas},
        }
    ).filled(on_gpu=options.device == "cuda")


def steady_rtfx(answers: Sequence[Answer], concurrency: int) -> float | None:
    """Seconds of audio per second between the answer after the first ``concurrency`` and the one before the last
    ``concurrency`` (pure)."""
    times = sorted(answer.at for answer in answers)[concurrency : len(answers) - concurrency]
    return (len(times) - 1) * WINDOW_S / (times[-1] - times[0]) if len(times) > concurrency else None


def measured(way: Way, outcome: clients.Outcome[dict[str, float]], concurrency: int) -> Measured:
    """(pure) Raises MeasurementFailed where a window has no text."""
    failed = [answer.error for answer in outcome.answers if answer.error is not None]
    if failed:
        raise MeasurementFailed(f"{way}: {len(failed)} of {len(outcome.answers)} windows failed: {failed[0]}")
    spent = {part: outcome.after[part] - outcome.before[part] for part in PARTS}
    other_work = sum(map(is_other_work, outcome.answers))
    steady = steady_rtfx(outcome.answers, concurrency)
    return Measured(way, len(outcome.answers), outcome.wall_s, other_work, spent, steady)


def is_other_work(answer: Answer) -> bool:
    return answer.tokens != NEW_TOKENS or answer.temperature != 0


def measure_engine(dims: Dims, options: argparse.Namespace) -> Run:
    windows = min(SLOTS, options.windows)
    job = Job(SYSTEMS["engine"], dims, (windows,), repeats=3, seconds=ENGINE_SECONDS, device=options.device)
    return run(options.model, "engine", job)


@contextmanager
def application(dims: Dims, options: argparse.Namespace, folder: Path) -> Iterator[tuple[Settings, Mapping[Way, str]]]:
    """Runs it; gives where the clients find it, each their way."""
    checkpoint = folder / f"{options.model}.pt"
    write_checkpoint(dims, checkpoint)
    settings = settings_for(checkpoint, options, free_port())
    with running(settings) as url:
        yield settings, {"handle": ray.get_runtime_context().gcs_address, "http": url}


def measure(dims: Dims, options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """The raw results, and whether the goal was reached."""
    raw: dict[str, Any] = {"model": options.model, "device": options.device, "concurrency": options.concurrency}

    def keep(**more: Any) -> None:
        raw.update(more)
        if options.json is not None:
            report.write_json(options.json, {"environment": report.environment(options.commit), **raw})

    console.print("the engine by itself …")
    alone = measure_engine(dims, options)
    engine = alone.best
    if engine is None:
        console.print(f"no figure: {alone.error or alone.left_out}", highlight=False, markup=False)
    keep(engine=asdict(alone) | {"rtfx": engine and engine.rtfx})
    ways: list[Measured] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = speech_windows(min(RECORDINGS, options.windows))
        np.save(folder / "recordings.npy", recordings)
        console.print("starting the application …")
        with application(dims, options, folder) as (settings, addresses):
            of_serve = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
            keep(settings=settings.model_dump(mode="json", exclude={"http": {"api_keys"}}), serve=of_serve)
            recorder = None if options.record is None else Recorder(targets())
            for way in options.ways:
                console.print(f"{options.windows} windows, {way} …", highlight=False)
                load = Load(
                    way,
                    addresses[way],
                    settings.app_name,
                    folder / "recordings.npy",
                    options.windows,
                    options.concurrency,
                    options.clients,
                )
                ways.append(measured(way, clients.run(load, cpu_seconds), options.concurrency))
                keep(ways=[asdict(one) | {"rtfx": one.rtfx} for one in ways])
            if recorder is not None:
                recorder.stop(after_s=SETTLE_S)
                recorder.write(options.record)
        voice = voice_activity_seconds(recordings)
    ratio = ratio_of(ways, engine)
    keep(voice_activity_s_an_hour=voice, ratio=ratio)
    show(console, options.model, engine, ways, voice)
    same = all(one.other_work == 0 for one in ways)
    if not same:
        console.print(f"[red]other work[/]: not {NEW_TOKENS} tokens at temperature 0 in every window")
    reached = same and ratio is not None and ratio >= GOAL
    said = "–" if ratio is None else f"{ratio:.2f}"
    console.print(f"goal: the handle at least {GOAL} of the engine; measured {said}", highlight=False)
    return raw, reached


def ratio_of(ways: Iterable[Measured], engine: Size | None) -> float | None:
    """The handle's throughput by the engine's, which begins and ends with full slots: steady, where it is known
    (pure)."""
    handle = next((one for one in ways if one.way == "handle"), None)
    return None if handle is None or engine is None else (handle.steady_rtfx or handle.rtfx) / engine.rtfx


def show(console: Console, model: str, engine: Size | None, ways: Sequence[Measured], voice: float) -> None:
    speed = Table(title=f"{model}: {NEW_TOKENS} tokens a window, beside the engine by itself")
    for column in ("", "windows", "seconds", "RTFx", "steady", "× engine", "other work"):
        speed.add_column(column, justify="right" if column else "left")
    if engine is not None:
        speed.add_row("engine", str(engine.batch), f"{engine.median_s:.2f}", f"{engine.rtfx:,.0f}", "", "1.00", "")
    for one in ways:
        steady = one.steady_rtfx
        beside = "–" if engine is None else f"{(steady or one.rtfx) / engine.rtfx:.2f}"
        middle = "–" if steady is None else f"{steady:,.0f}"
        figures = (str(one.windows), f"{one.wall_s:.2f}", f"{one.rtfx:,.0f}", middle, beside, str(one.other_work))
        speed.add_row(one.way, *figures)
    console.print(speed)
    cost = Table(title="CPU: seconds for an hour of audio, and cores kept busy")
    cost.add_column("part")
    for one in ways:
        cost.add_column(f"{one.way}: s", justify="right")
        cost.add_column("cores", justify="right")
    for part in PARTS:
        cost.add_row(part, *(text for one in ways for text in (f"{one.an_hour(part):.2f}", f"{one.cores(part):.2f}")))
        if part == API:
            busy = (voice / 3600 * one.rtfx for one in ways)
            cost.add_row(
                "  of it voice activity, alone", *(text for b in busy for text in (f"{voice:.2f}", f"{b:.2f}"))
            )
    console.print(cost)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="large-v3", help="whose shapes (%(default)s)")
    parser.add_argument("--windows", type=int, default=4096, help="each way (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=3 * SLOTS, help="windows under way at once (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="processes that send (%(default)s)")
    parser.add_argument("--api-replicas", type=int, help="of the product (its own default)")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS), help="of handle,http (both)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the raw results there, anew after every step")
    parser.add_argument("--record", type=Path, help="keep what the metrics port says meanwhile there (.om.gz)")
    parser.add_argument("--commit", help="commit of this code, where it lies outside of its repository")
    options = parser.parse_args(arguments)
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    return options


def main(arguments: Sequence[str] | None = None, models: Mapping[str, Dims] = MODELS) -> int:
    options = parse(arguments)
    if options.record is not None:
        os.environ.setdefault(REPORT_VARIABLE, REPORT_MS)
    try:
        _, reached = measure(models[options.model], options, report.console())
    except MeasurementFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
