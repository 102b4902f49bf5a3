from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from serve_app.api.limits import FORM_ALLOWANCE, while_connected
from tests.api.conftest import Running, Serve

CAP = 2 * 2**20
HEAD = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    b"Expect: 100-continue\r\n"
)


@pytest.fixture
def small(serve: Serve) -> Running:
    return serve(audio={"max_upload_bytes": CAP})


def upload(size: int) -> Iterator[bytes]:
    """A form with a file of that many bytes, in pieces, so that the client sends it chunked."""
    yield b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n'
    yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    for start in range(0, size, 65_536):
        yield bytes(min(65_536, size - start))
    yield b"\r\n--b--\r\n"


def post_chunked(api: Running, size: int) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    return api.http.post("/v1/audio/transcriptions", content=upload(size), headers=headers)


def is_too_large(response: httpx.Response) -> bool:
    assert response.json()["error"]["message"] == "The upload is larger than 2 MiB."
    assert response.json()["error"]["code"] == "audio_too_large"
    return response.status_code == 413


def test_a_recording_of_just_the_cap_is_taken(small: Running) -> None:
    assert post_chunked(small, CAP).status_code == 200
    assert len(small.service.asked[-1][0]) == CAP


@pytest.mark.parametrize("size", [CAP + 1, CAP + FORM_ALLOWANCE + 1])
def test_a_larger_one_is_refused_also_without_a_length(small: Running, size: int) -> None:
    assert is_too_large(post_chunked(small, size))
    assert not small.service.asked


def test_openai_s_client_hears_of_it(small: Running) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 2 MiB") as caught:
        small.openai().audio.transcriptions.create(file=("a.wav", bytes(2 * CAP)), model="base")
    assert caught.value.status_code == 413


def test_a_declared_length_is_refused_before_the_body_is_read(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_a_length_is_refused_while_it_comes_in(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in itertools.islice(upload(2 * CAP), 2 + (CAP + FORM_ALLOWANCE) // 65_536):
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_the_next_request_is_served(small: Running) -> None:
    post_chunked(small, 4 * CAP)
    assert small.post().status_code == 200


async def departed() -> Message:
    return {"type": "http.disconnect"}


async def stays() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_work_that_ends_gives_its_result() -> None:
    assert await while_connected(stays, asyncio.sleep(0, "done")) == "done"


async def test_work_that_fails_raises() -> None:
    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(stays, fails())


async def test_a_departure_waits_until_the_cancelled_work_has_ended() -> None:
    tidied = False

    async def work() -> None:
        nonlocal tidied
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            tidied = True

    with pytest.raises(ClientDisconnect):
        await while_connected(departed, work())
    assert tidied
