"""The application at work, once: ``python -m loadtest.demo``, or ``make demo``.

Starts it on the embedded model, sends the bundled sample through the HTTP endpoint, prints what came back and how long
it took, and ends. Status 1 where the transcript is not what the sample says.
"""

from __future__ import annotations

import asyncio
import difflib
import sys
from pathlib import Path

import av
from rich.console import Console
from rich.markup import escape
from whisper.normalizers import EnglishTextNormalizer

from loadtest import server, traffic

ASSETS = Path(__file__).resolve().parents[1] / "serve_app" / "assets"
WORDS_RIGHT = 0.9  # other hardware may round a word into another; a broken installation loses nearly all of them


def words_right(reference: str, transcript: str) -> tuple[int, int]:
    """How many of the reference's words the transcript has in their order, and how many there are."""
    said, heard = (EnglishTextNormalizer()(text).split() for text in (reference, transcript))
    blocks = difflib.SequenceMatcher(None, said, heard, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks), len(said)


def duration(path: Path) -> float:
    with av.open(str(path)) as container:
        assert container.duration is not None
        return container.duration / 1_000_000


def main() -> int:
    console = Console(highlight=False)
    sample = ASSETS / "sample.flac"
    console.print(f"starting whisper-serve with {server.DEFAULT_MODEL} …")
    try:
        with server.serving(None) as at:
            console.print(f"ready at {at.url} after {at.ready_s:.1f} s")
            upload = traffic.Upload(str(sample), sample)
            [reply] = asyncio.run(traffic.transcribe_all(at.url, [upload], concurrency=1))
    except server.ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    if not reply.ok:
        print(f"the sample was not transcribed: status {reply.status} {reply.message}", file=sys.stderr)
        return 1
    seconds = duration(sample)
    right, words = words_right((ASSETS / "sample.txt").read_text(), reply.text)
    console.print(f"\nPOST {at.url}{traffic.ENDPOINT}  file={sample.name}")
    console.print(f"[bold]{escape(reply.text.strip())}[/]\n")
    console.print(f"{seconds:.1f} s of audio in {reply.seconds:.2f} s, {seconds / reply.seconds:.1f} × real time")
    console.print(f"{right} of {words} words right")
    console.print("The server has ended; `make serve` starts one that stays up.")
    return 0 if right >= WORDS_RIGHT * words else 1


if __name__ == "__main__":
    raise SystemExit(main())
