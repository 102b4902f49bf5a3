"""Odd, damaged and hostile uploads, while normal requests go on, and what they do to the server's memory::

    python -m loadtest.hostile                                       # starts a server
    python -m loadtest.hostile --url http://127.0.0.1:8000 --pid 42  # the server that runs there, with that process id

Ends with status 1 where a reply is not what it should be, a normal request fails, or a process of the server grows
by more than 200 MB; with 2 where the recordings are absent.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest import dataset, processes, report, server, traffic, uploads
from loadtest.dataset import Recording
from loadtest.scoring import Pair, score
from loadtest.traffic import Reply, Upload

ASSETS = Path(__file__).resolve().parents[1] / "serve_app" / "assets"
GROWTH_LIMIT_BYTES = 200_000_000
WARM_UP_REQUESTS = 16
NORMAL_CONCURRENCY = 2
ERROR_LIMIT_PERCENT = 25.0  # of a clip in some odd encoding; decoding it wrongly loses nearly every word

Answer = Literal["transcript", "refusal"]
ANSWERS: tuple[Answer, ...] = ("transcript", "refusal")


@dataclass(frozen=True, slots=True)
class Case:
    """An upload, which answers are right, and the text to be heard in it, where there is one."""

    upload: Upload
    right: tuple[Answer, ...]
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """``fault`` says what is wrong with the reply; empty where it is right."""

    case: Case
    reply: Reply
    fault: str


def right_answers(expect: str | None) -> tuple[Answer, ...]:
    """The manifest's words on a damaged file, as the answers that are right. Without words a transcript is.

    Raises ValueError on words of an unknown kind.
    """
    if expect is None:
        return ("transcript",)
    if expect.startswith("clean 4xx error"):
        return ("refusal",)
    if "or clean error" in expect or expect.startswith("no crash"):
        return ANSWERS
    if expect.startswith("decodes"):
        return ("transcript",)
    raise ValueError(f"what the manifest expects is not understood: {expect!r}")


def fault(case: Case, reply: Reply) -> str:
    """What is wrong with the reply, in words; empty where it is right (pure)."""
    if reply.ok:
        if "transcript" not in case.right:
            return "transcribed, but it should be refused"
        if case.reference:
            percent = score([Pair(case.reference, reply.text, "en")]).percent
            if percent > ERROR_LIMIT_PERCENT:
                return f"{percent:.0f} % of its words are wrong"
        return ""
    if not 400 <= reply.status < 500:
        return "no answer" if reply.status == traffic.NO_ANSWER else f"status {reply.status}"
    if "refusal" not in case.right:
        return "refused, but it should be transcribed"
    return "" if reply.message else "the refusal has no message"


def recorded_cases(recordings: Iterable[Recording]) -> list[Case]:
    """The set's odd containers and encodings, damaged files and edge lengths."""
    return [
        Case(Upload(r.file, r.path, "en"), right_answers(r.expect), r.text)
        for r in dataset.select(recordings, "formats", "corrupt", "edge_length")
    ]


def hostile_cases(trap_url: str) -> list[Case]:
    """Uploads that a server with its default caps must refuse. ``trap_url`` is where nobody may ever call."""
    local_file = "file:///etc/passwd"
    made = {
        "nine_hours.opus": uploads.opus(9 * uploads.HOUR_S),
        "nine_hours.aac": uploads.aac(9 * uploads.HOUR_S),
        "rate_1_hz.wav": uploads.wav(sample_rate=1),
        "rate_2_ghz.wav": uploads.wav(sample_rate=2**31 - 1),
        "rate_400_khz.wav": uploads.wav(sample_rate=400_000),
        "64_channels.wav": uploads.wav(channels=64, seconds=10),
        "playlist.m3u8": uploads.hls_playlist(local_file, trap_url),
        "concat_file.wav": uploads.concat_list(local_file),
        "concat_url.wav": uploads.concat_list(trap_url),
        "manifest.mpd": uploads.dash_manifest(trap_url),
    }
    return [Case(Upload(name, content, "en"), ("refusal",)) for name, content in made.items()]


@asynccontextmanager
async def trap() -> AsyncIterator[tuple[str, list[str]]]:
    """A local web server nobody may call: its URL, and the callers so far."""
    callers: list[str] = []

    async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(str(writer.get_extra_info("peername")))
        writer.close()

    listener = await asyncio.start_server(called, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/audio.wav", callers


async def send(http: httpx.AsyncClient, cases: Sequence[Case], *, at_once: bool) -> list[Outcome]:
    async def one(case: Case) -> Outcome:
        reply = await traffic.transcribe(http, case.upload)
        return Outcome(case, reply, fault(case, reply))

    if at_once:
        return await asyncio.gather(*map(one, cases))
    return [await one(case) for case in cases]


def normal_case() -> Case:
    text = (ASSETS / "sample.txt").read_text()
    return Case(Upload("sample.flac", (ASSETS / "sample.flac").read_bytes(), "en"), ("transcript",), text)


@asynccontextmanager
async def normal_traffic(http: httpx.AsyncClient, case: Case) -> AsyncIterator[list[Outcome]]:
    """Good requests one after the other, two at a time, until the block is left; the list fills meanwhile."""
    outcomes: list[Outcome] = []
    over = asyncio.Event()

    async def keep_asking() -> None:
        while not over.is_set():
            outcomes.extend(await send(http, [case], at_once=False))

    async with asyncio.TaskGroup() as group:
        for _ in range(NORMAL_CONCURRENCY):
            group.create_task(keep_asking())
        try:
            yield outcomes
        finally:
            over.set()


@dataclass(frozen=True, slots=True)
class Result:
    uploads: list[Outcome]
    normal: list[Outcome]
    callers: list[str]
    growth: list[processes.Growth]

    def faults(self) -> list[str]:
        """Everything that went wrong, a sentence each; empty where all is right."""
        found = [f"{o.case.upload.name}: {o.fault}" for o in self.uploads if o.fault]
        found += [f"a normal request: {o.fault} {o.reply.message}" for o in self.normal if o.fault]
        found += [f"an upload made the server call {len(self.callers)} times"] if self.callers else []
        found += [
            f"process {g.process.pid} grew by {g.resident / 1e6:.0f} MB: {g.title}"
            for g in self.growth
            if g.resident > GROWTH_LIMIT_BYTES
        ]
        return found


async def measure(url: str, pid: int, recordings: Sequence[Recording], api_key: str | None) -> Result:
    """Warm the server up, then send the set's files one by one and the hostile ones all at once."""
    normal = normal_case()
    async with traffic.client(url, api_key) as http, trap() as (trap_url, callers):
        hostile = hostile_cases(trap_url)
        await send(http, [normal] * WARM_UP_REQUESTS, at_once=True)
        with processes.MemoryWatch(pid) as watch:
            async with normal_traffic(http, normal) as answered:
                outcomes = await send(http, recorded_cases(recordings), at_once=False)
                outcomes += await send(http, hostile, at_once=True)
        answered += await send(http, [normal], at_once=False)
    return Result(outcomes, answered, callers, watch.growth())


def _print(console: Console, result: Result) -> None:
    view = Table(title="odd, damaged and hostile uploads")
    for column in ("upload", "status", "seconds", "answer", "fault"):
        view.add_column(column)
    for outcome in result.uploads:
        reply = outcome.reply
        cells = (
            outcome.case.upload.name,
            str(reply.status),
            f"{reply.seconds:.2f}",
            _cut(reply.text or reply.message, 64),
            outcome.fault,
        )
        view.add_row(*map(escape, cells))
    console.print(view)
    memory = Table(title="memory of the server's processes, MB (largest growth first)")
    for column in ("process", "before", "peak", "growth", "private growth", "title"):
        memory.add_column(column, justify="left" if column == "title" else "right")
    for g in result.growth[:8]:
        figures = (g.first.resident, g.peak.resident, g.resident, g.private)
        memory.add_row(str(g.process.pid), *(f"{figure / 1e6:.0f}" for figure in figures), escape(_cut(g.title, 56)))
    console.print(memory)
    seconds = [outcome.reply.seconds for outcome in result.normal]
    console.print(
        f"{len(seconds)} normal requests meanwhile: median {statistics.median(seconds):.2f} s, "
        f"longest {max(seconds):.2f} s"
    )
    for sentence in result.faults():
        console.print("[red]fault[/]", escape(sentence))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _raw(result: Result) -> dict[str, Any]:
    def row(outcome: Outcome) -> dict[str, Any]:
        return {**asdict(outcome.reply), "right": outcome.case.right, "fault": outcome.fault}

    return {
        "environment": report.environment(),
        "uploads": [row(outcome) for outcome in result.uploads],
        "normal": [row(outcome) for outcome in result.normal],
        "callers": result.callers,
        "growth": [asdict(growth) for growth in result.growth],
        "faults": result.faults(),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server.add_arguments(parser)
    parser.add_argument("--pid", type=int, help="with --url: the server's process, whose memory is watched")
    parser.add_argument("--model", default=server.DEFAULT_MODEL, help="model to start a server for (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the raw results there")
    dataset.add_argument(parser)
    options = parser.parse_args(arguments)
    if (options.url is None) != (options.pid is None):
        parser.error("--url and --pid belong together: the memory of the server's processes is watched")
    if not processes.available():
        parser.error("watching the server's memory needs /proc")
    return options


def main() -> int:
    options = parse()
    recordings, _ = dataset.load_or_exit(options.audio)
    try:
        with server.serving(options.url, options.model) as at:
            pid = options.pid if at.pid is None else at.pid
            if not processes.tree(pid):
                print(f"there is no process {pid}", file=sys.stderr)
                return 1
            result = asyncio.run(measure(at.url, pid, recordings, options.api_key))
    except server.ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    _print(report.console(), result)
    if options.json is not None:
        report.write_json(options.json, _raw(result))
    return 1 if result.faults() else 0


if __name__ == "__main__":
    raise SystemExit(main())
