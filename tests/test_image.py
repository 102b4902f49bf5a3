"""The Dockerfile: clean by hadolint, and true to what it copies and runs. No container engine runs here."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kernels.compile import ARCHITECTURES, CACHE_VARIABLE
from serve_app.settings import ENV_PREFIX, Settings
from tests.conftest import ROOT

DOCKERFILE = ROOT / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined as Docker joins them."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    found = [re.split(r"\s+", line, maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def environment() -> dict[str, str]:
    """What the image sets, the last of each name."""
    return {key: value for line in of("ENV") for key, value in re.findall(r"(\w+)=(\S+)", line)}


def default(argument: str) -> str:
    """Of a build argument."""
    (value,) = {line.partition("=")[2] for line in of("ARG") if line.startswith(f"{argument}=")}
    return value


def test_hadolint_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run(
        [linter, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN cd /tmp && sudo apt-get install wget\n")
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode != 0
    assert "DL3007" in checked.stdout


def test_what_is_copied_is_there_and_is_let_through() -> None:
    lets = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lets[0] == "*"
    let_through = {line.removeprefix("!") for line in lets if line.startswith("!")}
    copied = {source for line in of("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert copied == let_through
    for name in copied:
        assert (ROOT / name).exists()
    refused = [line for line in lets[1:] if not line.startswith("!")]
    assert any(fnmatch.fnmatch("serve_app/__pycache__", pattern.replace("**/", "*")) for pattern in refused)


def test_what_the_wheel_is_made_of_is_copied() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {source for line in of("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert set(packages["packages"]) | {PROJECT["readme"], *PROJECT["license-files"]} <= copied


@pytest.mark.parametrize("extras", ["base", ""])
def test_the_dependencies_are_those_of_the_project(tmp_path: Path, extras: str) -> None:
    (line,) = [run for run in of("RUN") if "requirements.txt" in run and "tomllib" in run]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, env={"PATH": path, "EXTRAS": extras}, check=True, timeout=60)
    wanted = PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["base"] if extras else [])
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


def test_kernels_are_built_for_all_that_they_are_tested_for() -> None:
    assert default("KERNEL_ARCHITECTURES").split(",") == list(ARCHITECTURES)
    (line,) = [run for run in of("RUN") if "kernels build" in run]
    folder = re.search(r"--output (\S+);", line)
    assert folder is not None
    assert environment()[CACHE_VARIABLE] == folder[1]
    assert f"--from=kernels {folder[1]} {folder[1]}" in of("COPY")


def test_the_image_sets_what_the_settings_know(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: value for name, value in environment().items() if name.startswith(ENV_PREFIX)}
    ours.pop(CACHE_VARIABLE)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert Settings().http.host == "0.0.0.0"  # or nobody outside of the container reaches it
    assert f"{Settings().http.port}" in of("EXPOSE")[0].split()
    assert f"127.0.0.1:{Settings().http.port}/readyz" in of("HEALTHCHECK")[0]


def test_versions_are_the_projects() -> None:
    assert default("VERSION") == PROJECT["version"]
    assert re.fullmatch(r"docker\.io/library/python:3\.12-slim-\w+", default("BASE"))
    assert PROJECT["requires-python"] == ">=3.11,<3.13"


def test_nothing_runs_as_root() -> None:
    assert of("USER") == ["1000:1000"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")
