"""What the Ray handle does with many recordings: with an application whose transcribing is to sleep."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.client import Client
from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript
from serve_app.errors import InvalidAudio, InvalidRequest, Overloaded, ServiceError

PATIENCE_S = 60.0
FOREVER, DAMAGED, BUSY, LATE = 600.0, -1.0, -2.0, -3.0


class Sleeping:
    """Samples are [seconds] to sleep, or DAMAGED, or BUSY: too busy, when it comes first, or LATE and how many others
    are done before it is."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._handled: list[float] = []
        self._now = self._most = self._left = 0
        self._refused = False

    async def transcribe(self, samples: np.ndarray[Any, Any], options: TranscribeOptions, rate: int) -> Transcript:
        seconds, *others = samples.tolist()
        if seconds == DAMAGED:
            raise InvalidAudio("it is damaged")
        if seconds == BUSY and not self._refused:
            self._refused = True
            raise Overloaded("try again", retry_after_s=0.1)
        self._now += 1
        self._most = max(self._most, self._now)
        try:
            await asyncio.sleep(max(0.0, seconds))
            until = time.monotonic() + PATIENCE_S
            while others and len(self._handled) < others[0] and time.monotonic() < until:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self._left += 1
            raise
        finally:
            self._now -= 1
        self._handled.append(seconds)
        return Transcript(text=str(seconds), language="en", duration=seconds, task=options.task, segments=[])

    async def seen(self) -> tuple[int, int, int, int]:
        """Recordings that were done, that are under way now, most that were at once, and whose caller has left."""
        return len(self._handled), self._now, self._most, self._left


def deploy(**options: Any) -> Iterator[tuple[Client, DeploymentHandle[Any]]]:
    name = f"client-{uuid.uuid4().hex[:8]}"
    application = serve.deployment(name="api", graceful_shutdown_timeout_s=0.1, **options)(Sleeping)
    handle = serve.run(application.bind(), name=name, route_prefix=None)
    yield Client(name), handle
    serve.delete(name)


@pytest.fixture(scope="module")
def deployed(ray_cluster: int) -> Iterator[tuple[Client, DeploymentHandle[Any]]]:
    yield from deploy(max_ongoing_requests=100)


@pytest.fixture
def sleeping(deployed: tuple[Client, DeploymentHandle[Any]]) -> tuple[Client, DeploymentHandle[Any]]:
    deployed[1].forget.remote().result(timeout_s=PATIENCE_S)
    return deployed


@pytest.fixture
def narrow(ray_cluster: int) -> Iterator[tuple[Client, DeploymentHandle[Any]]]:
    yield from deploy(max_ongoing_requests=1, max_queued_requests=1)


def seen(handle: DeploymentHandle[Any]) -> tuple[int, int, int, int]:
    found: tuple[int, int, int, int] = handle.seen.remote().result(timeout_s=PATIENCE_S)
    return found


def wait_for(handle: DeploymentHandle[Any], *, under_way: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (now := seen(handle)[1]) != under_way:
        assert time.monotonic() < deadline, f"{now} are under way, not {under_way}"
        time.sleep(0.05)


def texts(outcomes: Iterable[Transcript | ServiceError]) -> list[str]:
    return [type(o).__name__ if isinstance(o, ServiceError) else o.text for o in outcomes]


def test_one_that_takes_long_keeps_no_other_from_being_sent(sleeping: tuple[Client, DeploymentHandle[Any]]) -> None:
    client, handle = sleeping
    recordings = [np.array([LATE, 40]), *[np.array([0.01])] * 40]
    outcomes = client.transcribe_many(iter(recordings), concurrency=4)
    assert isinstance(first := next(outcomes), Transcript)
    assert first.text == str(LATE)
    done, _, most, _ = seen(handle)
    assert (done, most) == (41, 4)
    assert texts(outcomes) == ["0.01"] * 40


def test_outcomes_come_in_order_and_errors_are_those_of_their_recordings(
    sleeping: tuple[Client, DeploymentHandle[Any]],
) -> None:
    client, _ = sleeping
    recordings = [np.array([s]) for s in (0.3, DAMAGED, 0.2, BUSY, 0.1)]
    assert texts(client.transcribe_many(recordings)) == ["0.3", "InvalidAudio", "0.2", str(BUSY), "0.1"]
    with pytest.raises(InvalidAudio, match="damaged"):
        client.transcribe(np.array([DAMAGED]))
    assert client.transcribe(np.array([0.0])).text == "0.0"


def test_outcomes_that_wait_for_an_earlier_one_are_bounded(
    sleeping: tuple[Client, DeploymentHandle[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.client.AHEAD", 3)
    client, handle = sleeping
    recordings = [np.array([LATE, 11]), *[np.array([0.01])] * 40]
    outcomes = client.transcribe_many(recordings, concurrency=4)
    next(outcomes)
    assert seen(handle)[0] == 3 * 4
    assert texts(outcomes) == ["0.01"] * 40


def test_who_leaves_early_ends_what_is_under_way(sleeping: tuple[Client, DeploymentHandle[Any]]) -> None:
    client, handle = sleeping
    outcomes = client.transcribe_many([np.array([s]) for s in (0.0, FOREVER, FOREVER, FOREVER)], concurrency=2)
    next(outcomes)
    wait_for(handle, under_way=2)
    outcomes.close()
    wait_for(handle, under_way=0)
    done, _, _, left = seen(handle)
    assert (done, left) == (1, 2)


def test_where_there_is_no_room_a_recording_is_sent_again(narrow: tuple[Client, DeploymentHandle[Any]]) -> None:
    client, _ = narrow
    recordings = [np.array([0.2])] * 6
    assert texts(client.transcribe_many(recordings, concurrency=6)) == ["0.2"] * 6


def test_no_concurrency_is_refused(sleeping: tuple[Client, DeploymentHandle[Any]]) -> None:
    client, _ = sleeping
    with pytest.raises(InvalidRequest, match="at least 1"):
        client.transcribe_many([], concurrency=0)
    with pytest.raises(InvalidRequest, match="unknown option"):
        client.transcribe_many([], volume=11)
