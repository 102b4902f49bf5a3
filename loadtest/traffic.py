"""Recordings sent to a server's transcription endpoint, many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ENDPOINT = "/v1/audio/transcriptions"
TIMEOUT = httpx.Timeout(3600, connect=10)
NO_ANSWER = 0


@dataclass(frozen=True, slots=True)
class Upload:
    """What one request sends. Without a language the server detects it."""

    name: str
    content: Path | bytes
    language: str | None = None

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the transcript with status 200, else the message of OpenAI's error object (empty where the body
    is none). Status 0: no answer at all, and why. ``seconds`` is from the first byte sent to the last received."""

    name: str
    status: int
    text: str
    message: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == httpx.codes.OK


def client(url: str, api_key: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, limits=limits)


async def transcribe(http: httpx.AsyncClient, upload: Upload) -> Reply:
    """Send one recording. An answer of any status is a reply; so is none."""
    fields = {"model": "whisper-1", "response_format": "json"}
    if upload.language is not None:
        fields["language"] = upload.language
    content = await asyncio.to_thread(upload.read)
    begin = time.monotonic()
    try:
        response = await http.post(ENDPOINT, data=fields, files={"file": (Path(upload.name).name, content)})
    except httpx.TransportError as error:
        return Reply(upload.name, NO_ANSWER, "", f"{type(error).__name__}: {error}", time.monotonic() - begin)
    seconds = time.monotonic() - begin
    if response.status_code == httpx.codes.OK:
        return Reply(upload.name, response.status_code, response.json()["text"], "", seconds)
    return Reply(upload.name, response.status_code, "", _message(response), seconds)


async def transcribe_all(
    url: str,
    uploads: Sequence[Upload],
    *,
    concurrency: int,
    api_key: str | None = None,
    on_reply: Callable[[Reply], None] = lambda reply: None,
) -> list[Reply]:
    """Send all, at most ``concurrency`` at once, in their order; the replies come in the uploads' order."""
    turn = asyncio.Semaphore(concurrency)

    async def one(upload: Upload) -> Reply:
        async with turn:
            reply = await transcribe(http, upload)
        on_reply(reply)
        return reply

    async with client(url, api_key) as http:
        return await asyncio.gather(*map(one, uploads))


async def served_models(url: str, api_key: str | None = None) -> list[str]:
    """The ids in /v1/models."""
    async with client(url, api_key) as http:
        response = await http.get("/v1/models")
        response.raise_for_status()
        return [model["id"] for model in response.json()["data"]]


def _message(response: httpx.Response) -> str:
    try:
        body: Any = response.json()
    except ValueError:
        return ""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else ""
