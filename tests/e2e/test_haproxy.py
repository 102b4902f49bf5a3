"""The application behind HAProxy instead of Serve's own proxy, as docs/operations.md recommends for many uploads."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest import processes
from loadtest.server import serve_command, started
from tests.conftest import free_port


def test_a_recording_is_transcribed_behind_haproxy(monkeypatch: pytest.MonkeyPatch, sample: Path) -> None:
    import openai

    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    for name in ("METRICS", "STATS"):  # it has fixed ones by default, which another cluster on this machine may have
        monkeypatch.setenv(f"RAY_SERVE_HAPROXY_{name}_PORT", str(free_port()))
    port = free_port()
    command = [*serve_command(), "--port", str(port), "--model", "embedded:tiny.en"]
    with started(command, f"http://127.0.0.1:{port}") as server:
        assert server.pid is not None
        assert any("haproxy" in processes.title(p.pid) for p in processes.tree(server.pid))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        assert client.audio.transcriptions.create(model="whisper-1", file=sample).text
        with pytest.raises(openai.BadRequestError, match="not audio"):
            client.audio.transcriptions.create(model="whisper-1", file=("a.mp3", b"no audio"))
