"""Keeps what the application's metrics port says over a load, so that a Prometheus can be asked about it later::

    python -m loadtest.recording tests/metrics/recordings/cpu.om.gz --seconds 20 --clients 4

starts the application on this machine, as its settings say, sends the bundled sample over and over, and writes the
file. ``loadtest.gpu.serving --record`` does so under its own load. The file is OpenMetrics text with time stamps,
gzipped: ``promtool tsdb create-blocks-from openmetrics`` makes a database of it (``tests/metrics/test_recordings.py``).
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families

from loadtest.server import free_port
from serve_app.running import running
from serve_app.settings import Settings

PREFIX = "ray_whisper_"
RAYS_OWN = ("Component", "NodeAddress", "SessionName", "Version", "JobId")
"""Labels that say nothing of the application; so does everything that begins with ``otel_``."""

REPORT_MS = "1000"
REPORT_VARIABLE = "RAY_metrics_report_interval_ms"
"""How often Ray's processes report to their node's port: to be set before Ray starts."""

SETTLE_S = 5.0
"""After which all that has happened is on the ports."""

SAMPLE = Path(__file__).resolve().parents[1] / "serve_app" / "assets" / "sample.flac"


class Point(NamedTuple):
    """One sample of one series. family and kind as OpenMetrics names them."""

    family: str
    kind: str
    name: str
    labels: tuple[tuple[str, str], ...]
    value: float
    at: float


def targets() -> list[str]:
    """The metrics ports of the cluster that this process has joined."""
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]


def read(text: str, at: float) -> list[Point]:
    """The application's samples in what a metrics port says (pure)."""
    ours = [line for line in text.splitlines() if line.startswith((PREFIX, f"# TYPE {PREFIX}"))]
    points = []
    for family in text_string_to_metric_families("\n".join(ours) + "\n"):
        for sample in family.samples:
            kept = {k: v for k, v in sample.labels.items() if k not in RAYS_OWN and not k.startswith("otel_")}
            if "WorkerId" in kept:
                kept["WorkerId"] = kept["WorkerId"][:8]
            labels = tuple(sorted(kept.items()))
            points.append(Point(family.name, family.type, sample.name, labels, float(sample.value), at))
    return points


def openmetrics(points: Iterable[Point]) -> str:
    """As OpenMetrics text: families together, in them every series by itself, in the order of time (pure)."""
    families: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        families[point.family, point.kind].append(point)
    lines = []
    for (family, kind), members in sorted(families.items()):
        lines.append(f"# TYPE {family} {kind}")
        for point in sorted(members, key=lambda p: (p.name, p.labels, p.at)):
            labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in point.labels)
            lines.append(f"{point.name}{{{labels}}} {point.value!r} {point.at:.3f}")
    return "\n".join([*lines, "# EOF", ""])


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Recorder:
    """Asks the ports once a period, on a thread of its own, until it is stopped."""

    def __init__(self, ports: Sequence[str], period_s: float = 1.0, now: Callable[[], float] = time.time):
        self.points: list[Point] = []
        self._ports, self._period, self._now = tuple(ports), period_s, now
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def stop(self, after_s: float = 0.0) -> None:
        """after_s: go on so long, for what is still on its way to the ports."""
        time.sleep(after_s)
        self._stopped.set()
        self._thread.join(timeout=30)

    def write(self, path: Path) -> None:
        """Raises RuntimeError where nothing was heard."""
        if not self.points:
            raise RuntimeError(f"no metrics of the application at {', '.join(self._ports)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(openmetrics(self.points).encode(), mtime=0))

    def _run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self._stopped.wait(self._period):
                for port in self._ports:
                    with suppress(httpx.TransportError):  # the next one may come through
                        self.points += read(client.get(f"http://{port}/metrics").text, self._now())


def send(url: str, seconds: float, clients: int) -> int:
    """Transcribes the sample, by so many clients at once, one after the other; gives how often. Raises
    httpx.HTTPStatusError where one is refused."""
    audio, end = SAMPLE.read_bytes(), time.monotonic() + seconds

    def client(_: int) -> int:
        sent = 0
        while time.monotonic() < end:
            form = {"model": "whisper-1", "language": "en"}
            files = {"file": (SAMPLE.name, audio)}
            httpx.post(f"{url}/v1/audio/transcriptions", files=files, data=form, timeout=300).raise_for_status()
            sent += 1
        return sent

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(client, range(clients)))


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.recording", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="of the recording (.om.gz)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="at once (%(default)s)")
    options = parser.parse_args(arguments)
    os.environ.setdefault(REPORT_VARIABLE, REPORT_MS)
    with running(Settings(http={"port": free_port()})) as url:
        recorder = Recorder(targets())
        sent = send(url, options.seconds, options.clients)
        recorder.stop(after_s=SETTLE_S)
        recorder.write(options.path)
    print(f"{sent} recordings, {len(recorder.points)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
