from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import httpx

from tests.e2e.replicas import occupancy

STAGES = ("features", "encoder", "decoder")


def held() -> int:
    """Windows that all stages hold together."""
    each = [occupancy(stage) for stage in STAGES]
    return sum(o.waiting + o.running for o in each)


def test_a_client_that_disconnects_frees_its_work(application: str, shared_audio: Path) -> None:
    long = shared_audio / "synth_long" / "piper-alice.mp3"  # ten minutes: half a minute of work and more
    finished = threading.Event()

    def leave_early() -> None:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.Client(timeout=httpx.Timeout(60, read=6)) as client,
            long.open("rb") as audio,
        ):
            client.post(f"{application}/v1/audio/transcriptions", files={"file": audio}, data={"model": "whisper-1"})
            finished.set()

    client = threading.Thread(target=leave_early)
    client.start()
    most = 0
    while client.is_alive():
        most = max(most, held())
        time.sleep(0.1)
    assert not finished.is_set(), "the recording was transcribed before the client left; take a longer one"
    assert most > 4
    deadline = time.monotonic() + 5
    while (left := held()) > 0:
        assert time.monotonic() < deadline, f"{left} windows are still held after the client has left"
        time.sleep(0.2)
