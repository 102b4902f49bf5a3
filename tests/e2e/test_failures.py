"""Replicas that are killed while requests are in flight."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.replicas import occupancy, pids

REQUESTS = 20


def post(url: str, file: Path) -> httpx.Response:
    with file.open("rb") as audio:
        return httpx.post(
            f"{url}/v1/audio/transcriptions",
            files={"file": audio},
            data={"model": "whisper-1", "language": "en", "response_format": "text"},
            timeout=240,
        )


@pytest.fixture(scope="module")
def clips(shared_audio: Path, manifest: list[dict[str, Any]]) -> list[Path]:
    """Read speech of the cleanest kind: the likeliest token leads by far, whatever a window is batched with."""
    rows = [r for r in manifest if r["category"] == "en_short" and "LJ Speech" in r["source"] and r["seconds"] < 8]
    return [shared_audio / r["file"] for r in rows][:REQUESTS]


@pytest.fixture(scope="module")
def undisturbed(application: str, clips: list[Path]) -> list[str]:
    with ThreadPoolExecutor(REQUESTS) as pool:
        return [response.text for response in pool.map(lambda clip: post(application, clip), clips)]


def wait_for_replicas(deployment: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(pids(deployment)) < count:
        assert time.monotonic() < deadline, f"{deployment} did not get its {count} replicas back"
        time.sleep(0.2)


@pytest.mark.parametrize("stage", ["decoder", "encoder", "features"])
def test_no_request_is_lost_when_a_replica_is_killed(
    stage: str, application: str, clips: list[Path], undisturbed: list[str]
) -> None:
    wait_for_replicas(stage, 2)
    with ThreadPoolExecutor(REQUESTS) as pool:
        pending = [pool.submit(post, application, clip) for clip in clips]
        deadline = time.monotonic() + 60
        while occupancy(stage).running == 0:  # killed in the middle of work
            assert time.monotonic() < deadline, f"no window ever ran at the {stage} stage"
        os.kill(pids(stage)[0], signal.SIGKILL)
        responses = [p.result() for p in pending]
    assert [r.status_code for r in responses] == [200] * len(clips)
    assert [r.text for r in responses] == undisturbed
