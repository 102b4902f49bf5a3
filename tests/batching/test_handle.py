"""The batching handle against real replicas on the session's Ray cluster."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.batching.handle import BatchingHandle
from serve_app.batching.messages import StageWindow
from serve_app.batching.router import StageRouter
from serve_app.errors import DeadlineExceeded, TranscriptionFailed
from serve_app.stages.transport import export_samples
from tests.batching.obedient import ObedientStage

Start = Callable[..., Awaitable[BatchingHandle]]


@pytest.fixture
async def start(ray_cluster: None) -> AsyncIterator[Start]:
    """Deploys an ``ObedientStage`` and gives a handle on it."""
    names: list[str] = []

    async def deploy(*, replicas: int = 1, credit: int = 8, **arguments: int) -> BatchingHandle:
        names.append(f"stage-{uuid.uuid4().hex[:8]}")
        deployment = serve.deployment(
            name="stage",
            num_replicas=replicas,
            max_ongoing_requests=1000,
            health_check_period_s=1,
            graceful_shutdown_timeout_s=0.1,
            request_router_config=RequestRouterConfig(request_router_class=StageRouter),
        )(ObedientStage)
        raw = await asyncio.to_thread(serve.run, deployment.bind(**arguments), name=names[-1], route_prefix=None)
        handle = BatchingHandle(raw, credit=credit)
        async with asyncio.timeout(30):
            while not handle.ready:
                await asyncio.sleep(0.05)
        return handle

    yield deploy
    for name in names:
        await asyncio.to_thread(serve.delete, name)


def window(order: float, *, timeout: float = 60, **fields: Any) -> StageWindow:
    """A window whose work is to sleep for ``order`` seconds (or another order of ``ObedientStage``)."""
    descriptor = export_samples(np.array([order]))
    return StageWindow(uuid.uuid4().hex, descriptor, 1.0, time.time() + timeout, **fields)


async def test_windows_that_come_while_the_stage_is_busy_run_as_one_batch(start: Start) -> None:
    handle = await start(budget=4)
    first = asyncio.create_task(handle.call(window(0.5)))
    await asyncio.sleep(0.2)
    rest = await asyncio.gather(*(handle.call(window(0.05)) for _ in range(4)))
    assert (await first)[1] == 1
    assert [size for _, size in rest] == [4, 4, 4, 4]


async def test_windows_beyond_the_credit_wait_at_the_caller_and_all_are_done(start: Start) -> None:
    handle = await start(budget=2, credit=3)
    calls = [asyncio.create_task(handle.call(window(0.05))) for _ in range(12)]
    await asyncio.sleep(0.02)
    assert handle.waiting >= 6
    assert len(await asyncio.gather(*calls)) == 12


async def test_several_replicas_share_the_work(start: Start) -> None:
    handle = await start(replicas=2, budget=1, credit=2)
    results = await asyncio.gather(*(handle.call(window(0.1)) for _ in range(8)))
    assert len({pid for pid, _ in results}) == 2


async def test_an_urgent_window_overtakes_in_the_queue(start: Start) -> None:
    handle = await start(budget=1, credit=4)
    order: list[str] = []

    async def run(name: str, **fields: Any) -> None:
        await handle.call(window(0.15, **fields))
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(run("running"))
        await asyncio.sleep(0.05)
        for name in ("calm 1", "calm 2", "calm 3"):
            group.create_task(run(name, priority="batch"))
        await asyncio.sleep(0.02)
        group.create_task(run("urgent", priority="interactive"))
    assert order.index("urgent") <= 1 + order.index("running")


async def test_a_window_whose_deadline_passes_is_given_up(start: Start) -> None:
    handle = await start(budget=1)
    blocker = asyncio.create_task(handle.call(window(1.0)))
    await asyncio.sleep(0.1)
    with pytest.raises(DeadlineExceeded):
        await handle.call(window(0.0, timeout=0.3))
    await blocker


async def test_a_cancelled_call_takes_its_window_out_of_the_replica(start: Start) -> None:
    handle = await start(budget=1)
    blocker = asyncio.create_task(handle.call(window(0.6)))
    await asyncio.sleep(0.1)
    unwanted = asyncio.create_task(handle.call(window(30.0)))
    await asyncio.sleep(0.1)
    unwanted.cancel()
    began = time.monotonic()
    await blocker
    await handle.call(window(0.0))
    assert time.monotonic() - began < 10


async def test_an_error_of_the_stage_is_its_windows_error_and_the_replica_goes_on(start: Start) -> None:
    handle = await start(budget=1)
    with pytest.raises(ValueError, match="as ordered"):
        await handle.call(window(-2.0))
    assert await handle.call(window(0.0))


async def test_a_full_queue_refuses_and_the_windows_are_sent_again(start: Start) -> None:
    handle = await start(budget=1, credit=6, max_queued_windows=2)
    results = await asyncio.gather(*(handle.call(window(0.05)) for _ in range(6)))
    assert len(results) == 6


async def test_windows_of_a_replica_that_dies_are_done_by_another(start: Start) -> None:
    handle = await start(replicas=2, budget=4, credit=8)
    pid, _ = await handle.call(window(0.0))
    calls = [asyncio.create_task(handle.call(window(0.5))) for _ in range(6)]
    await asyncio.sleep(0.2)
    import os
    import signal

    os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*calls)
    assert len(results) == 6
    assert all(survivor != pid for survivor, _ in results)


async def test_a_window_that_kills_its_replica_ends_in_an_error_after_two_and_the_others_are_done(start: Start) -> None:
    handle = await start(replicas=3, budget=4, credit=8)
    before = {(await handle.call(window(0.0)))[0] for _ in range(12)}
    good = [asyncio.create_task(handle.call(window(0.3))) for _ in range(6)]
    poison = asyncio.create_task(handle.call(window(-1.0)))
    with pytest.raises(TranscriptionFailed):
        await poison
    assert len(await asyncio.gather(*good)) == 6
    await asyncio.sleep(0.5)
    survivors = {(await handle.call(window(0.0)))[0] for _ in range(12)} & before
    assert len(survivors) >= len(before) - 2
