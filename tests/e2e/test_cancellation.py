from __future__ import annotations

import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.e2e.replicas import occupancy

STAGES = ("features", "encoder", "decoder")


def held() -> int:
    """Windows that all stages hold together."""
    each = [occupancy(stage) for stage in STAGES]
    return sum(o.waiting + o.running for o in each)


def wait_until_held(windows: range, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (now := held()) not in windows:
        assert time.monotonic() < deadline, f"{now} windows are held after {seconds:g} s"
        time.sleep(0.1)


def test_a_client_that_disconnects_frees_its_work(application: str, shared_audio: Path) -> None:
    long = shared_audio / "synth_long" / "piper-alice.mp3"  # ten minutes: half a minute of work and more
    request = httpx.Request(
        "POST",
        f"{application}/v1/audio/transcriptions",
        files={"file": ("alice.mp3", long.read_bytes())},
        data={"model": "whisper-1"},
    )
    address = urlsplit(application)
    client = http.client.HTTPConnection(address.hostname or "", address.port)
    client.request("POST", address.path + "/v1/audio/transcriptions", request.read(), dict(request.headers))
    wait_until_held(range(5, 1000), seconds=60)
    client.close()
    wait_until_held(range(1), seconds=5)
