"""Fixtures shared by all tests: the recordings, and one Ray cluster with the application in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A machine that does other things meanwhile is no mistake of the code.
hypothesis.settings.register_profile("project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]
SHARED_AUDIO = ROOT.parent / "shared" / "audio"


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """The folder of real recordings with references; it is no part of the repository."""
    if not (SHARED_AUDIO / "manifest.jsonl").is_file():
        pytest.skip(f"the recordings are not at {SHARED_AUDIO}")
    return SHARED_AUDIO


@pytest.fixture(scope="session")
def manifest(shared_audio: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared_audio / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def sample() -> Path:
    """The bundled sample recording."""
    return ROOT / "serve_app" / "assets" / "sample.flac"


@pytest.fixture(scope="session")
def sample_text() -> str:
    return (ROOT / "serve_app" / "assets" / "sample.txt").read_text().strip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[int]:
    """The session's Ray cluster; gives the port that Serve listens on."""
    import logging
    import os

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_app.app import WORKER_ENV

    os.environ.update(WORKER_ENV)
    # The tests of metrics wait for them; Ray reads this spelling only.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    yield port
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def application(ray_cluster: int) -> Iterator[str]:
    """The application on the embedded default with two replicas of each stage; gives its URL."""
    from serve_app.running import running
    from serve_app.settings import Settings

    two = {"replicas": 2}
    settings = Settings(http={"port": ray_cluster}, features=two, encoder=two, decoder=two)
    with running(settings) as url:
        yield url
