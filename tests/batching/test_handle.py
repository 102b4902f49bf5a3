"""The batching handle against real replicas on the session's Ray cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serve_app.batching.handle import BatchingHandle
from serve_app.batching.messages import StageWindow
from serve_app.batching.router import StageRouter
from serve_app.errors import DeadlineExceeded, TranscriptionFailed
from serve_app.stages.replica import Occupancy
from tests.batching.obedient import ENDS, HOLDS, RAISES, ObedientStage

Stage = DeploymentHandle[Any]


def deploy(*, replicas: int = 1, **arguments: int) -> Iterator[DeploymentHandle[Any]]:
    name = f"stage-{uuid.uuid4().hex[:8]}"
    deployment = serve.deployment(
        name="stage",
        num_replicas=replicas,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=0.1,
        request_router_config=RequestRouterConfig(request_router_class=StageRouter),  # type: ignore[arg-type]
    )(ObedientStage)
    yield serve.run(deployment.bind(**arguments), name=name, route_prefix=None)
    serve.delete(name)


@pytest.fixture(scope="module")
def stage(ray_cluster: int) -> Iterator[DeploymentHandle[Any]]:
    """One replica that runs batches of up to four windows."""
    yield from deploy(budget=4)


@pytest.fixture
def three_replicas(ray_cluster: int) -> Iterator[DeploymentHandle[Any]]:
    yield from deploy(replicas=3, budget=4)


@pytest.fixture
def small_queue(ray_cluster: int) -> Iterator[DeploymentHandle[Any]]:
    yield from deploy(budget=1, max_queued_windows=2)


@pytest.fixture
def breaks_once(ray_cluster: int) -> Iterator[DeploymentHandle[Any]]:
    yield from deploy(breaks=1)


@pytest.fixture
def breaks_always(ray_cluster: int) -> Iterator[DeploymentHandle[Any]]:
    yield from deploy(breaks=10**6)


async def connect(stage: DeploymentHandle[Any], *, credit: int = 8) -> BatchingHandle:
    """A batching handle of this test's event loop, once it knows the stage's replicas."""
    handle = BatchingHandle(stage, credit=credit)
    async with asyncio.timeout(120):
        while not handle.ready:
            await asyncio.sleep(0.02)
    return handle


def window(order: float, *, timeout: float = 240, **fields: Any) -> StageWindow:
    """A window whose work is to sleep for ``order`` seconds (or another order of ``ObedientStage``)."""
    return StageWindow(uuid.uuid4().hex, np.array([order]), 1.0, time.time() + timeout, **fields)


async def until(stage: Stage, *, waiting: int, running: int) -> None:
    """The stage's only replica holds so many windows."""
    occupancy = stage.options(method_name="occupancy")
    async with asyncio.timeout(120):
        while await occupancy.remote() != Occupancy(waiting, running):
            await asyncio.sleep(0.02)


async def busy(stage: Stage, handle: BatchingHandle) -> asyncio.Task[Any]:
    """A call whose window runs until the stage is released."""
    call = asyncio.create_task(handle.call(window(HOLDS)))
    await until(stage, waiting=0, running=1)
    return call


async def release(stage: Stage) -> None:
    await stage.options(method_name="release").remote()


async def test_windows_that_come_while_the_stage_is_busy_run_as_one_batch(stage: Stage) -> None:
    handle = await connect(stage)
    first = await busy(stage, handle)
    rest = [asyncio.create_task(handle.call(window(0.0))) for _ in range(4)]
    await until(stage, waiting=4, running=1)
    await release(stage)
    assert (await first)[1] == 1
    assert [size for _, size in await asyncio.gather(*rest)] == [4, 4, 4, 4]


async def test_gpus_of_replicas_that_others_have_called_before_are_known(stage: Stage) -> None:
    await stage.options(method_name="occupancy").remote()
    handle = await connect(stage)
    async with asyncio.timeout(10):
        while handle.gpus != {"GPU-of-this-test"}:
            await asyncio.sleep(0.02)


async def test_a_replica_that_did_not_tell_its_gpu_is_asked_again(stage: Stage) -> None:
    await stage.options(method_name="hide_gpu").remote()
    handle = await connect(stage)
    async with asyncio.timeout(60):
        while handle.gpus != {"GPU-of-this-test"}:
            await asyncio.sleep(0.02)


async def test_windows_beyond_the_credit_wait_at_the_caller_and_all_are_done(stage: Stage) -> None:
    handle = await connect(stage, credit=3)
    first = await busy(stage, handle)
    calls = [asyncio.create_task(handle.call(window(0.0))) for _ in range(11)]
    await until(stage, waiting=2, running=1)
    assert handle.waiting().windows == 9
    await release(stage)
    assert len(await asyncio.gather(first, *calls)) == 12


async def test_windows_gather_at_the_caller_until_some_credit_has_returned(stage: Stage) -> None:
    handle = await connect(stage, credit=16)
    first = await busy(stage, handle)
    calls = [asyncio.create_task(handle.call(window(HOLDS))) for _ in range(15)]
    await until(stage, waiting=15, running=1)
    waits = asyncio.create_task(handle.call(window(0.0)))
    await asyncio.sleep(0)
    assert handle.waiting().windows == 1
    await release(stage)  # one window ends, four begin
    await first
    await until(stage, waiting=11, running=4)
    assert handle.waiting().windows == 1  # credit for one has returned: not enough
    urgent = asyncio.create_task(handle.call(window(0.0, priority="interactive")))
    await until(stage, waiting=12, running=4)
    assert handle.waiting().windows == 1
    await release(stage)  # four windows end, and four begin
    await until(stage, waiting=9, running=4)
    assert handle.waiting().windows == 0
    async with asyncio.timeout(120):
        while not all(call.done() for call in (*calls, waits, urgent)):
            await release(stage)
            await asyncio.sleep(0.05)


async def test_an_urgent_window_overtakes_in_the_replicas_queue(stage: Stage) -> None:
    handle = await connect(stage, credit=32)
    order: list[str] = []

    async def run(name: str, **fields: Any) -> None:
        await handle.call(window(0.3, **fields))
        order.append(name)

    first = await busy(stage, handle)
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(run(f"calm {number}", priority="batch"))
        await until(stage, waiting=8, running=1)
        group.create_task(run("urgent", priority="interactive"))
        await until(stage, waiting=9, running=1)
        await release(stage)
    await first
    # with the next batch of four, not after the eight that came before it
    assert order.index("urgent") <= 3


async def test_a_window_whose_deadline_passes_is_given_up(stage: Stage) -> None:
    handle = await connect(stage)
    blocker = await busy(stage, handle)
    late = asyncio.create_task(handle.call(window(0.0, timeout=0.3)))
    await asyncio.sleep(0.4)
    await release(stage)
    with pytest.raises(DeadlineExceeded):
        await late
    await blocker


async def test_a_cancelled_call_takes_its_window_out_of_the_replica(stage: Stage) -> None:
    handle = await connect(stage)
    blocker = await busy(stage, handle)
    unwanted = asyncio.create_task(handle.call(window(0.0)))
    await until(stage, waiting=1, running=1)
    unwanted.cancel()
    await until(stage, waiting=0, running=1)
    await release(stage)
    await blocker
    assert await handle.call(window(0.0))


async def test_an_error_of_the_stage_is_its_windows_error_and_the_replica_goes_on(stage: Stage) -> None:
    handle = await connect(stage)
    with pytest.raises(ValueError, match="as ordered"):
        await handle.call(window(RAISES))
    assert await handle.call(window(0.0))


async def test_a_full_queue_refuses_and_the_windows_are_sent_again(
    small_queue: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    handle = await connect(small_queue)
    # some calls end while what they were refused is under way in others
    with caplog.at_level("WARNING", logger="serve_app.batching.handle"):
        results = await asyncio.gather(*(handle.call(window(0.3)) for _ in range(8)))
    assert len(results) == 8
    assert "undone" not in caplog.text


async def test_a_call_that_breaks_off_is_made_again(breaks_once: Stage) -> None:
    handle = BatchingHandle(breaks_once, credit=8)
    assert not handle.ready  # so the windows wait, and leave in one call
    results = await asyncio.gather(*(handle.call(window(0.05)) for _ in range(3)))
    assert [size for _, size in results] == [1, 1, 1]  # each might have been the reason


async def test_a_late_end_of_a_broken_call_does_not_meet_the_next(breaks_once: Stage) -> None:
    handle = await connect(breaks_once)
    assert (await handle.call(window(1.0)))[1] == 1  # it runs when the first attempt is cancelled


async def test_calls_that_always_break_off_end_in_an_error(breaks_always: Stage) -> None:
    handle = await connect(breaks_always)
    with pytest.raises(TranscriptionFailed):
        await handle.call(window(0.05))


async def test_replicas_share_the_work_and_what_a_dead_one_held_is_done_by_the_others(three_replicas: Stage) -> None:
    handle = await connect(three_replicas, credit=2)
    calls = [asyncio.create_task(handle.call(window(0.5))) for _ in range(12)]
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    victim, _ = done.pop().result()
    os.kill(victim, signal.SIGKILL)
    results = await asyncio.gather(*calls)
    assert len({pid for pid, _ in results}) >= 2


async def test_a_window_that_kills_replicas_ends_in_an_error_after_two_and_the_others_are_done(
    three_replicas: Stage,
) -> None:
    handle = await connect(three_replicas)
    before = {pid for pid, _ in await asyncio.gather(*(handle.call(window(0.2)) for _ in range(24)))}
    good = [asyncio.create_task(handle.call(window(0.3))) for _ in range(6)]
    poison = asyncio.create_task(handle.call(window(ENDS)))
    with pytest.raises(TranscriptionFailed):
        await poison
    assert len(await asyncio.gather(*good)) == 6
    alive = [pid for pid in before if Path(f"/proc/{pid}").exists()]
    assert len(alive) == len(before) - 2
