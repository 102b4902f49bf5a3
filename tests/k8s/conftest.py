from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.k8s.answering import Answering, answering
from tests.k8s.apiserver import ApiServer
from tests.k8s.controller import RULES, Operator


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A stand-in for the API server; a controller has just the permissions that it says it needs."""
    server = ApiServer(rules=list(RULES))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def operator(server: ApiServer) -> Operator:
    return Operator(server)


@pytest.fixture
def answer() -> Iterator[Answering]:
    with answering() as answer:
        yield answer
