"""A real Prometheus for tests: Debian's ``prometheus`` and ``promtool``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import ROOT, free_port

RULES = ROOT / "helm" / "whisper-serve" / "rules"
"""The folder of recording rules and alerts."""
SCRAPE_S = 1
SETTLED_S = 5 * SCRAPE_S

Series = dict[tuple[tuple[str, str], ...], float]
"""Values by their labels, which are sorted pairs."""


def program(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``. Without it the test is skipped, in CI it fails."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed: apt-get install prometheus (make packages)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path


@dataclass(frozen=True)
class Prometheus:
    """A server that runs. url: of its HTTP API."""

    url: str

    def query(self, expression: str, at: float | None = None) -> Series:
        """The expression's value, now or at a Unix time: labels, as sorted pairs, → value."""
        asked = {"query": expression} | ({} if at is None else {"time": f"{at:.3f}"})
        response = httpx.get(f"{self.url}/api/v1/query", params=asked, timeout=10)
        assert response.status_code == 200, response.text
        found = response.json()["data"]["result"]
        return {tuple(sorted(each["metric"].items())): float(each["value"][1]) for each in found}

    def value(self, expression: str) -> float:
        """Of an expression with one value; 0 where it has none yet."""
        values = list(self.query(expression).values())
        assert len(values) <= 1, f"{expression} has {len(values)} values"
        return values[0] if values else 0.0

    def settled(self, expressions: Sequence[str]) -> dict[str, Series]:
        """The expressions' values, once none has changed for some seconds: on a busy machine reports come late, and
        each process's by itself."""
        deadline = time.monotonic() + 120
        values, since = self._values(expressions), time.monotonic()
        while time.monotonic() < since + SETTLED_S:
            assert time.monotonic() < deadline, "the counts go on"
            time.sleep(SCRAPE_S)
            if (now := self._values(expressions)) != values:
                values, since = now, time.monotonic()
        return values

    def _values(self, expressions: Sequence[str]) -> dict[str, Series]:
        return {expression: self.query(expression) for expression in expressions}

    def wait_for(self, expression: str, wanted: float) -> None:
        deadline = time.monotonic() + 60
        while (now := self.value(expression)) < wanted:
            assert time.monotonic() < deadline, f"{expression} is still {now}, not {wanted}"
            time.sleep(SCRAPE_S / 2)

    def targets_up(self) -> list[str]:
        found = httpx.get(f"{self.url}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        return [target["scrapeUrl"] for target in found if target["health"] == "up"]

    def rule_errors(self) -> dict[str, str]:
        """Rule → why its last evaluation failed."""
        groups = httpx.get(f"{self.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert rules, "no rules are loaded"
        return {
            rule["name"]: f"{rule['health']}: {rule.get('lastError', '')}" for rule in rules if rule["health"] != "ok"
        }


@contextlib.contextmanager
def prometheus(folder: Path, targets: Sequence[str], rules: Path = RULES) -> Iterator[Prometheus]:
    """Runs a server that scrapes the targets (host:port) and evaluates the rules of a folder, every second."""
    binary = program("prometheus")
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(rules / "*.yaml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=100y",  # recordings are old
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/-/ready").status_code == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(timeout=60)
