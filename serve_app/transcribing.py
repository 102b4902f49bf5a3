"""``whisper-serve transcribe``: files through a server's HTTP API, several at once, with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PATHS = {"transcribe": "/v1/audio/transcriptions", "translate": "/v1/audio/translations"}


@dataclass(frozen=True, slots=True)
class Job:
    """What to do. form: the fields of the API's request besides file and model. suffix: of the files written."""

    files: Sequence[Path]
    task: str
    form: dict[str, str]
    suffix: str
    output_dir: Path | None
    concurrency: int
    api_key: str | None


def transcribe_files(url: str, job: Job) -> int:
    """Transcribes the job's files; prints the texts in the files' order, or writes each as it is done. Returns how many
    failed; their errors go to stderr."""
    console, errors = Console(), Console(stderr=True)
    if job.output_dir is not None:
        job.output_dir.mkdir(parents=True, exist_ok=True)
    headers = {"Authorization": f"Bearer {job.api_key}"} if job.api_key else {}
    failed = 0
    texts: dict[Path, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        httpx.Client(base_url=url, headers=headers, timeout=None) as client,  # noqa: S113 - the server has a deadline
        ThreadPoolExecutor(job.concurrency) as pool,
        Progress(*columns, console=errors, transient=True) as progress,
    ):
        bar = progress.add_task("transcribing", total=len(job.files))
        pending = {pool.submit(_transcribe, client, job, file): file for file in job.files}
        for done in as_completed(pending):
            file = pending[done]
            try:
                text = done.result()
            except (httpx.HTTPError, OSError, RuntimeError) as error:
                failed += 1
                errors.print(f"[red]{file}[/]: {error}", highlight=False)
            else:
                if job.output_dir is not None:
                    (job.output_dir / _name(file, job)).write_text(text, encoding="utf-8")
                else:
                    texts[file] = text
            progress.advance(bar)
    for file in job.files:
        if file in texts:
            if len(job.files) > 1:
                console.print(f"[bold]{file}[/]", highlight=False)
            console.print(texts[file].rstrip("\n"), highlight=False, markup=False, soft_wrap=True)
    return failed


def _transcribe(client: httpx.Client, job: Job, file: Path) -> str:
    with file.open("rb") as audio:
        response = client.post(
            PATHS[job.task], files={"file": (file.name, audio)}, data={"model": "whisper-1", **job.form}
        )
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text
        raise RuntimeError(f"{message} (HTTP {response.status_code})")
    return response.text


def _name(file: Path, job: Job) -> str:
    """talk.mp3 → talk.srt; with its own suffix kept where another file of the job would be named the same."""
    alike = sum(other.stem == file.stem for other in job.files) > 1
    return (file.name if alike else file.stem) + job.suffix
