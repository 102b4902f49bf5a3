"""The command line: ``whisper-serve serve | transcribe | doctor | kernels build``."""

from __future__ import annotations

import enum
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from kernels.compile import ARCHITECTURES, CompileError
from serve_app.settings import CONFIG_FILE_VARIABLE, Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Whisper speech-to-text as a Ray Serve application.")
kernels = typer.Typer(no_args_is_help=True, help="The CUDA kernels.")
app.add_typer(kernels, name="kernels")
errors = Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="Checkpoint: embedded:base, a path, or a model name.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with settings.", exists=True, dir_okay=False)]


class Format(enum.StrEnum):
    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    verbose_json = "verbose_json"


class Task(enum.Enum):
    transcribe = "transcribe"
    translate = "translate"


SUFFIXES = {
    Format.text: ".txt",
    Format.json: ".json",
    Format.srt: ".srt",
    Format.vtt: ".vtt",
    Format.verbose_json: ".json",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def settings_from(config: Path | None, **overrides: Mapping[str, object]) -> Settings:
    """Settings from flags over environment over file; ends the program with a readable list where they are wrong."""
    if config is not None:
        os.environ[CONFIG_FILE_VARIABLE] = str(config)
    given: dict[str, Any] = {}
    for section, values in overrides.items():
        if set_here := {name: value for name, value in values.items() if value is not None}:
            given[section] = set_here
    try:
        return Settings(**given)
    except ValidationError as invalid:
        for error in invalid.errors():
            where = ".".join(map(str, error["loc"]))
            errors.print(f"[red]setting {where}[/]: {error['msg']} (got {error['input']!r})")
        raise typer.Exit(2) from None


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    model: Model = None,
    config: Config = None,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Let replicas follow the load (settings: scaling).")
    ] = False,
) -> None:
    """Start the application and stay up until interrupted."""
    settings = settings_from(
        config,
        http={"host": host, "port": port},
        model={"source": model},
        scaling={"enabled": autoscale or None},
    )
    from serve_app.running import running

    stop = threading.Event()
    with running(settings) as url:
        # only now: Ray, when it starts, takes SIGTERM for itself, and would abort the process in the midst of its end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"whisper-serve is ready at {url}", flush=True)
        stop.wait()


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Audio files.", exists=True, dir_okay=False, readable=True)],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.text,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write a file for each recording here instead of printing.", file_okay=False)
    ] = None,
    language: Annotated[str | None, typer.Option(help="Spoken language; by default it is detected.")] = None,
    task: Annotated[Task, typer.Option(help="Transcribe, or translate into English.")] = Task.transcribe,
    prompt: Annotated[str | None, typer.Option(help="Text that steers spelling and style.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=1, help="Of sampling; 0 is greedy with fallback.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Files under way at once.")] = 8,
    url: Annotated[str | None, typer.Option(help="A running server; by default one is started and ended.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WHISPER_SERVE_API_KEY", help="The server's API key.")] = None,
    model: Model = None,
    config: Config = None,
) -> None:
    """Transcribe files."""
    if url is not None and (model is not None or config is not None):
        raise typer.BadParameter("--model and --config are for a server that is started here, not for --url")
    from serve_app.transcribing import Job, transcribe_files

    fields = {"language": language, "prompt": prompt, "temperature": str(temperature), "response_format": format.value}
    form = {name: value for name, value in fields.items() if value is not None}
    job = Job(files, task.value, form, SUFFIXES[format], output_dir, concurrency, api_key)
    if url is not None:
        failed = transcribe_files(url, job)
    else:
        from serve_app.running import running

        settings = settings_from(config, http={"port": free_port()}, model={"source": model})
        errors.print("starting the application …")
        with running(settings) as started:
            failed = transcribe_files(started, job)
    raise typer.Exit(1 if failed else 0)


@app.command()
def doctor(model: Model = None, config: Config = None) -> None:
    """Show what this machine has and what will run where; exit with 1 where the application cannot start."""
    settings = settings_from(config, model={"source": model})
    from serve_app.doctor import examine

    raise typer.Exit(0 if examine(settings, Console()) else 1)


@kernels.command("build")
def build_kernels(
    arch: Annotated[str, typer.Option(help="Architectures of GPUs, separated by commas.")] = ",".join(ARCHITECTURES),
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the machine code; by default the cache that kernels load from.", file_okay=False),
    ] = None,
) -> None:
    """Compile all kernels ahead of time, as for an image; no GPU is needed. Exit with 1 where one does not compile."""
    architectures = list(dict.fromkeys(arch.split(",")))
    if unknown := [name for name in architectures if name not in ARCHITECTURES]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    from serve_app.compiling import compile_kernels

    try:
        failed = compile_kernels(architectures, output)
    except (CompileError, OSError) as problem:
        errors.print(str(problem), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    sys.exit(app())


if __name__ == "__main__":
    main()
