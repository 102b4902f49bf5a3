from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import openai
import pytest
import uvicorn

from serve_app.api.routes import build_api
from serve_app.settings import Settings
from tests.api.service import FixedService


@dataclass
class Running:
    """The API over real HTTP."""

    service: FixedService
    url: str
    http: httpx.Client
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def openai(self, api_key: str = "unused") -> openai.OpenAI:
        if api_key not in self.clients:
            self.clients[api_key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)
        return self.clients[api_key]

    def post(
        self,
        path: str = "/v1/audio/transcriptions",
        data: dict[str, object] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """A request that is right but for what ``data`` and ``headers`` change."""
        form = {"model": "base"} | (data or {})
        return self.http.post(path, data=form, files={"file": ("a.wav", b"sound")}, headers=headers)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.http.get(path, headers=headers)


@contextlib.contextmanager
def running(service: FixedService, settings: Settings) -> Iterator[Running]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_api(service, settings), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url) as client:
                yield Running(service, url, client)
        finally:
            server.should_exit = True
            thread.join()


Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts the API over a service and settings of the test's own."""
    with contextlib.ExitStack() as servers:

        def start(service: FixedService | None = None, **settings: object) -> Running:
            return servers.enter_context(running(service or FixedService(), Settings(**settings)))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="session")
def plain_server() -> Iterator[Running]:
    with running(FixedService(), Settings()) as server:
        yield server


@pytest.fixture
def api(plain_server: Running) -> Running:
    """The API with default settings, shared by all tests that change nothing in it."""
    plain_server.service.asked.clear()
    return plain_server
