"""The command line, as a user runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kernels import registry
from kernels.compile import build
from serve_app.cli import app


def whisper_serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def test_doctor_tells_what_will_run_where() -> None:
    result = whisper_serve("doctor", WHISPER_SERVE_HTTP__PORT="0")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("cores", "audio sandbox", "NVRTC", "kernel cache", "decoder", "99 languages", "ready"):
        assert word in result.stdout


def test_doctor_names_what_stands_in_the_way() -> None:
    result = whisper_serve("doctor", "--model", "/nowhere/whisper.pt", WHISPER_SERVE_DECODER__NUM_GPUS="8")
    assert result.returncode == 1
    assert "/nowhere/whisper.pt" in result.stdout
    assert "8 GPUs" in result.stdout


def test_a_wrong_setting_is_named() -> None:
    result = whisper_serve("serve", WHISPER_SERVE_DECODER__SLOTS="none")
    assert result.returncode == 2
    assert "decoder.slots" in result.stderr


def test_kernels_are_compiled_ahead_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUILDS", (build("gelu.cu"), build("embedding.cu", WIDTH=384)))
    arguments = ["kernels", "build", "--arch", "sm_89,sm_100", "--output", str(tmp_path / "new")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = [path.name.rpartition("-")[0] for path in (tmp_path / "new").glob("*.cubin")]
    assert sorted(names) == ["embedding-sm_100", "embedding-sm_89", "gelu-sm_100", "gelu-sm_89"]
    assert re.search(r"\[1/4] sm_89  gelu\.cu: bias_gelu \d+ registers, 0 bytes spilled", result.stdout)
    assert "4 of 4 builds for sm_89, sm_100" in result.stdout


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BUILDS", (build("embedding.cu"), build("gelu.cu")))  # the first wants a WIDTH
    result = CliRunner().invoke(app, ["kernels", "build", "--arch", "sm_80", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert 'identifier "WIDTH" is undefined' in result.stderr
    assert "1 of 2 builds for sm_80" in result.stdout


def test_an_architecture_that_kernels_are_not_made_for_is_refused() -> None:
    result = whisper_serve("kernels", "build", "--arch", "sm_80,sm_70")
    assert result.returncode == 2
    assert "unknown: sm_70; there are sm_80, sm_89, sm_90a, sm_100" in result.stderr


def test_a_folder_that_cannot_be_written_to_is_named() -> None:
    result = whisper_serve("kernels", "build", "--output", "/proc/kernels")
    assert result.returncode == 1
    assert "/proc/kernels" in result.stderr
    assert "Traceback" not in result.stderr


def test_files_are_transcribed_into_a_folder(application: str, sample: Path, tmp_path: Path) -> None:
    twin = tmp_path / "sample.oga"  # another file that would be written to the same name
    shutil.copy(sample, twin)
    out = tmp_path / "texts"
    files = [str(sample), str(twin)]
    result = whisper_serve("transcribe", *files, "--url", application, "--format", "srt", "--output-dir", str(out))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == {"sample.flac.srt", "sample.oga.srt"}
    assert "00:00:00,000 --> " in (out / "sample.flac.srt").read_text()


def test_texts_are_printed_and_a_bad_file_fails_without_ending_the_others(
    application: str, sample: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.mp3"
    bad.write_text("no sound")
    result = whisper_serve("transcribe", str(bad), str(sample), "--url", application, "--language", "en")
    assert result.returncode == 1
    assert "This recording" in result.stdout
    assert "bad.mp3" in result.stderr


def test_a_server_that_is_not_there_is_an_error_that_a_person_understands(sample: Path) -> None:
    result = whisper_serve("transcribe", str(sample), "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "refused" in result.stderr.lower()
    assert "Traceback" not in result.stderr
