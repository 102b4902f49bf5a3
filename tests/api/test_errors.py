from __future__ import annotations

import asyncio
import logging
import re
import socket
import time

import openai
import pytest
from starlette.types import Message, Scope

from serve_app.api.routes import build_api
from serve_app.errors import (
    AudioTooLarge,
    DeadlineExceeded,
    InvalidAudio,
    Overloaded,
    ServiceError,
    TranscriptionFailed,
)
from serve_app.settings import Settings
from tests.api.conftest import Running, Serve
from tests.api.service import FixedService


@pytest.mark.parametrize(
    ("error", "status", "error_type", "code"),
    [
        (InvalidAudio("no audio stream", param="file"), 400, "invalid_request_error", "invalid_audio"),
        (AudioTooLarge("64 channels", param="file"), 413, "invalid_request_error", "audio_too_large"),
        (Overloaded("full"), 429, "rate_limit_error", "overloaded"),
        (TranscriptionFailed("a window failed"), 500, "server_error", "transcription_failed"),
        (DeadlineExceeded("too late"), 504, "server_error", "deadline_exceeded"),
    ],
)
def test_every_error_is_openai_s_object(
    serve: Serve, error: ServiceError, status: int, error_type: str, code: str
) -> None:
    response = serve(FixedService(error=error)).post()
    assert response.status_code == status
    assert response.json() == {
        "error": {"message": error.message, "type": error_type, "param": error.param, "code": code}
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (7.01, "8")])
def test_overload_says_when_to_come_again(serve: Serve, seconds: float, header: str) -> None:
    api = serve(FixedService(error=Overloaded("full", retry_after_s=seconds)))
    with pytest.raises(openai.RateLimitError) as caught:
        api.openai().audio.transcriptions.create(file=("a.wav", b"sound"), model="base")
    assert caught.value.response.headers["retry-after"] == header


def test_the_unexpected_is_logged_with_its_id_and_not_told(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = serve(FixedService(error=RuntimeError("secret path /srv/keys")))
    with caplog.at_level(logging.ERROR):
        response = api.post(headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["error"] == {
        "message": "The server had an error while processing your request (mine-1).",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert "request mine-1: POST /v1/audio/transcriptions failed" in caplog.text
    assert "secret path" in caplog.text


def test_failures_of_the_server_are_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        serve(FixedService(error=DeadlineExceeded("too late"))).post(headers={"x-request-id": "mine-2"})
    assert "request mine-2: DeadlineExceeded: too late" in caplog.text


def test_unknown_urls(api: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/models/", "/nothing"):
        response = api.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_wrong_methods(api: Running) -> None:
    response = api.get("/v1/audio/transcriptions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"] == {
        "message": "Invalid method (GET /v1/audio/transcriptions); allowed: POST.",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_supported",
    }


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/models/x", "/nothing", "/v1/audio/translations"])
def test_every_response_has_an_id_of_its_own(api: Running, path: str) -> None:
    ids = [api.get(path).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    assert ids[0] != ids[1]


def test_a_plain_request_id_is_kept(api: Running) -> None:
    assert api.get("/healthz", {"x-request-id": "job-7/file:3"}).headers["x-request-id"] == "job-7/file:3"


@pytest.mark.parametrize("client_id", ["", "a b", "<script>", "x" * 129])
def test_an_odd_request_id_is_replaced(api: Running, client_id: str) -> None:
    response = api.get("/healthz", {"x-request-id": client_id})
    assert response.headers["x-request-id"].startswith("req_")


def scope(path: str = "/v1/audio/transcriptions", boundary: str = "b") -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", f"multipart/form-data; boundary={boundary}".encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


BODY = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nsound\r\n--b--\r\n'
)


async def test_the_request_id_is_left_to_a_proxy_that_sends_it() -> None:
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await build_api(FixedService(), Settings(), set_request_id=False)(scope("/nothing"), receive, send)
    assert messages[0]["status"] == 404
    assert b"x-request-id" not in dict(messages[0]["headers"])


async def test_cancelling_the_request_cancels_the_work_and_answers_nothing() -> None:
    service = FixedService(hangs=True)
    messages: list[Message] = []
    body = iter([{"type": "http.request", "body": BODY, "more_body": False}])

    async def receive() -> Message:
        if (message := next(body, None)) is not None:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    request = asyncio.create_task(build_api(service, Settings())(scope(), receive, send))
    assert await asyncio.to_thread(service.started.wait, 5)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert service.cancelled.is_set()
    assert messages == []


def send_half_and_leave(url: str, request: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request)


HEAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"


def test_a_client_that_leaves_frees_its_work(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = serve(FixedService(hangs=True))
    host, port = api.url.removeprefix("http://").split(":")
    with caplog.at_level(logging.INFO, "serve_app"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
            assert api.service.started.wait(5)
        assert api.service.cancelled.wait(5)
        until_logged(caplog, "the client left")
    assert "failed" not in caplog.text


def test_a_client_that_leaves_while_uploading_is_no_error(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = serve()
    with caplog.at_level(logging.INFO, "serve_app"):
        send_half_and_leave(api.url, HEAD + b"Content-Length: 1000\r\n\r\n" + BODY)
        until_logged(caplog, "the client left")
    assert "failed" not in caplog.text
    assert not api.service.asked


def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + 5
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)
