"""Turns between real processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app import metrics
from serve_app.batching.feedback import FeedbackSettings
from serve_app.batching.messages import Done, Event, Failed, InputLost, StageCall, StageWindow
from serve_app.engine.checkpoint import load
from serve_app.engine.encoder import Encoder
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.settings import DecoderSettings, ModelSettings, Settings
from serve_app.stages.board import Address
from serve_app.stages.decoder import DecoderStage
from serve_app.stages.observed import StageObserver
from serve_app.stages.ring import RingDescriptor
from serve_app.stages.transport import StoredDescriptor
from serve_app.stages.turns import LONGEST_S, GpuTurns, gives_way
from tests.engine.conftest import SAMPLE, read_pcm
from tests.stages.test_feedback import SleepingStage, run, window

START = multiprocessing.get_context("spawn")
PATIENCE_S = 60.0  # for a process to start


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[GpuTurns]:
    made = GpuTurns("GPU-0", tmp_path)
    yield made
    made.close()


def _take(folder: Path, said: Connection, again: int) -> None:
    """Says when it wants the turn, when it has it and when it gives it, so many times; then keeps it."""
    turns = GpuTurns("GPU-0", folder)
    for _ in range(again):
        said.send("wants")
        turns.take()
        said.send(("has", time.monotonic()))
        time.sleep(0.02)
        said.send(("gives", time.monotonic()))
        turns.give()
    turns.take()
    said.send("keeps")
    time.sleep(PATIENCE_S)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[int, Connection]]:
    """A process that takes the turn three times and then keeps it."""
    ours, theirs = START.Pipe()
    process = START.Process(target=_take, args=(tmp_path, theirs, 3), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    yield process.pid, ours
    process.kill()
    process.join()


def _hears(said: Connection) -> object:
    assert said.poll(PATIENCE_S)
    return said.recv()


def test_nobody_wants_what_nobody_waits_for(turns: GpuTurns) -> None:
    turns.take()
    assert turns.held
    assert not turns.wanted
    turns.take()  # it is held already
    turns.give()
    assert not turns.held
    assert turns.held_s == 0


def test_who_gives_and_takes_again_comes_after_who_waits(turns: GpuTurns, other: tuple[int, Connection]) -> None:
    _, said = other
    turns.take()
    for _ in range(3):
        assert _hears(said) == "wants"
        while not turns.wanted:
            time.sleep(0.001)
        given = time.monotonic()
        turns.give()
        turns.take()
        taken = time.monotonic()
        kind, since = _hears(said)  # type: ignore[misc]
        assert kind == "has"
        kind, until = _hears(said)  # type: ignore[misc]
        assert kind == "gives"
        assert given <= since <= until <= taken  # never both


def test_what_was_spent_in_turns_and_waiting_for_them_is_known_at_any_time(
    turns: GpuTurns, other: tuple[int, Connection]
) -> None:
    _, said = other
    for _ in range(3):
        assert _hears(said) == "wants"
        for _ in range(2):
            _hears(said)  # has, gives
    assert _hears(said) == "keeps"
    assert turns.spent() == (0.0, 0.0)
    waiting = threading.Thread(target=turns.take)
    waiting.start()
    time.sleep(0.3)
    waited, held = turns.spent()
    assert (0.1 < waited < PATIENCE_S, held) == (True, 0.0)
    os.kill(other[0], signal.SIGKILL)
    waiting.join()
    time.sleep(0.2)
    waited_in_all, held = turns.spent()
    assert waited_in_all >= waited
    assert held > 0.1
    turns.give()
    _, held_in_all = turns.spent()
    time.sleep(0.1)
    assert held <= held_in_all == turns.spent()[1]
    assert turns.spent()[0] == waited_in_all


def test_a_dead_holders_turn_is_free(turns: GpuTurns, other: tuple[int, Connection]) -> None:
    pid, said = other
    while _hears(said) != "keeps":
        pass
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    turns.take()
    assert time.monotonic() - began < PATIENCE_S / 2  # it would have kept it


@given(held_s=st.floats(0, 1), free=st.integers(0, 256), waiting=st.integers(0, 512), slots=st.integers(1, 256))
def test_a_decoder_gives_way_sooner_the_more_slots_are_free(held_s: float, free: int, waiting: int, slots: int) -> None:
    free = min(free, slots)
    gives = gives_way(held_s=held_s, free=free, waiting=waiting, slots=slots)
    assert gives or held_s < LONGEST_S
    if gives:
        assert gives_way(held_s=held_s, free=slots, waiting=waiting, slots=slots)
        assert gives_way(held_s=held_s + 0.1, free=free, waiting=waiting, slots=slots)
    # with all slots full, or windows here that will fill them, only time makes it give way
    full = gives_way(held_s=held_s, free=free, waiting=max(waiting, free), slots=slots)
    assert full == (held_s >= LONGEST_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_batch_waits_for_its_turn_and_gives_it_up_again(tmp_path: Path, turns: GpuTurns) -> None:
    stage = SleepingStage(FeedbackSettings(enabled=False))
    stage.turns = GpuTurns("GPU-0", tmp_path)  # as on a GPU
    turns.take()
    done = asyncio.create_task(run(stage, [window("0")]))
    await until(lambda: turns.wanted)
    assert stage.sizes == []
    turns.give()
    await done
    assert stage.sizes == [1]
    assert not stage.turns.held
    assert not turns.wanted


def test_a_replica_tells_its_share_of_turns(turns: GpuTurns, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[float]] = {"held": [], "waited": []}
    monkeypatch.setattr(metrics.STAGE_TURN, "set", lambda value, **_: told["held"].append(value))
    monkeypatch.setattr(metrics.STAGE_TURN_WAIT, "set", lambda value, **_: told["waited"].append(value))
    stage = SleepingStage(FeedbackSettings(enabled=False))
    observer = StageObserver(stage, None)
    observer._observer.stop()
    observer._record_turns()
    assert told == {"held": [], "waited": []}  # it takes none
    stage.turns = turns
    turns.take()
    time.sleep(0.2)
    observer._record_turns()
    turns.give()
    observer._record_turns()
    time.sleep(0.2)
    observer._record_turns()
    assert 0 < told["held"][0] <= 1
    assert told["held"][2] == 0
    assert all(0 <= waited < 0.5 for waited in told["waited"])


async def decode(stage: DecoderStage, *states: np.ndarray[Any, Any]) -> list[list[int]]:
    windows = []
    for i, state in enumerate(states):
        arrived: asyncio.Future[np.ndarray[Any, Any]] = asyncio.get_running_loop().create_future()
        arrived.set_result(state)
        options = DecodeOptions(language="en", temperatures=(0.0,))
        input_ = StoredDescriptor(cast(Any, arrived))
        windows.append(StageWindow(str(i), input_, 1.0, time.time() + PATIENCE_S, options=options))
    done: dict[str, list[int]] = {}
    async for events in stage.process(StageCall(windows)):
        done |= {event.window_id: event.result.tokens for event in events if isinstance(event, Done)}
    return [done[window.window_id] for window in windows]


def decoder_of(slots: int) -> DecoderStage:
    model, decoder = (
        ModelSettings(source="embedded:tiny.en", compute="float32"),
        DecoderSettings(slots=slots, max_tokens=100),
    )
    return DecoderStage(Settings(model=model, decoder=decoder).filled(on_gpu=False))


@pytest.fixture(scope="module")
def states() -> list[np.ndarray[Any, Any]]:
    """Of two windows of speech."""
    speech, compute = read_pcm(SAMPLE), Compute.resolve("cpu", "float32")
    log_mel = LogMel(80, compute)([speech[:400_000], speech[80_000:]])
    return list(Encoder(load("embedded:tiny.en"), compute)(log_mel).numpy())


async def test_a_decoder_goes_on_while_its_event_loop_is_busy(states: list[np.ndarray[Any, Any]]) -> None:
    stage = decoder_of(4)
    running = asyncio.create_task(decode(stage, *states))
    await until(lambda: stage._slots.active == 2)
    before = [slot.position for slot in stage._slots._slots]
    time.sleep(0.3)  # noqa: ASYNC251 - the loop is to be busy
    assert all(slot.position > at + 1 for slot, at in zip(stage._slots._slots, before, strict=True))
    assert all(await running)


async def test_all_the_time_in_steps_counts_for_feedback(
    states: list[np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.stages.decoder.STINT_S", 0.2)  # many steps, as on a GPU
    stage, told = decoder_of(4), []
    monkeypatch.setattr(stage.feedback, "ran", lambda cost, seconds: told.append((cost, seconds)))
    began = time.monotonic()
    await decode(stage, *states)
    took = time.monotonic() - began
    assert 0.5 * took < sum(seconds for _, seconds in told) <= took
    assert all(0 < cost <= 2 for cost, _ in told)


async def test_more_windows_than_slots_enter_as_others_end(states: list[np.ndarray[Any, Any]]) -> None:
    alone, stage = decoder_of(4), decoder_of(2)
    expected = await decode(alone, *states)
    assert await decode(stage, *states, *states, states[0]) == [*expected, *expected, expected[0]]
    assert stage._slots.active == 0
    assert not stage._running
    assert not stage._entering


class SlowRings:
    """In place of ``RingReader``, which needs a GPU: inputs come into a ring while others are being read."""

    contents: ClassVar[dict[int, torch.Tensor | InputLost]] = {}

    def __init__(self, device: torch.device):
        self.device = device

    def read(self, descriptors: list[RingDescriptor]) -> list[torch.Tensor | InputLost]:
        time.sleep(0.1)
        return [self.contents[descriptor.slot] for descriptor in descriptors]


async def test_what_comes_into_a_ring_while_it_is_read_enters_later(
    states: list[np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = decoder_of(4)
    expected = await decode(stage, *states)
    monkeypatch.setattr("serve_app.stages.transport.RingReader", SlowRings)
    lost = InputLost("its producer has died")
    SlowRings.contents = {i: torch.from_numpy(states[i % 2]) if i != 3 else lost for i in range(6)}

    async def through_ring(slot: int) -> object:
        await asyncio.sleep(0.04 * slot)
        descriptor = RingDescriptor("GPU-0", Address(0, 0, b""), slot, 1, (1500, 384), torch.float32)
        options = DecodeOptions(language="en", temperatures=(0.0,))
        window = StageWindow(f"ring {slot}", descriptor, 1.0, time.time() + PATIENCE_S, options=options)
        [event] = [event async for events in stage.process(StageCall([window])) for event in events]
        return event.result.tokens if isinstance(event, Done) else cast(Failed, event).error

    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(*(through_ring(slot) for slot in range(6)))
    assert outcomes == [expected[0], expected[1], expected[0], lost, expected[0], expected[1]]


async def test_a_batch_goes_without_those_whose_input_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.stages.transport.RingReader", SlowRings)
    lost = InputLost("its producer has died")
    SlowRings.contents = {0: torch.zeros(1), 1: lost, 2: torch.zeros(1)}
    stage = SleepingStage(FeedbackSettings(enabled=False))

    async def run_all(slots: list[int]) -> list[object]:
        descriptors = [RingDescriptor("GPU-0", Address(0, 0, b""), slot, 1, (1,), torch.float32) for slot in slots]
        windows = [StageWindow(f"{d.slot}", d, 1.0, time.time() + PATIENCE_S) for d in descriptors]
        events = [event async for events in stage.process(StageCall(windows)) for event in events]
        return [event.error if isinstance(event, Failed) else type(event) for event in sorted(events, key=name_of)]

    assert await run_all([0, 1, 2]) == [Done, lost, Done]
    assert stage.sizes == [2]
    assert await run_all([1]) == [lost]
    assert stage.sizes == [2]


def name_of(event: Event) -> str:
    assert isinstance(event, Done | Failed)
    return event.window_id


async def test_a_decoder_steps_between_the_turns_of_others(
    tmp_path: Path, turns: GpuTurns, states: list[np.ndarray[Any, Any]]
) -> None:
    stage = decoder_of(4)
    undisturbed = await decode(stage, *states)
    stage.turns = GpuTurns("GPU-0", tmp_path)  # as on a GPU
    running = asyncio.create_task(decode(stage, *states))
    await until(lambda: stage._slots.active == 2)
    had = 0
    while not running.done():
        await asyncio.to_thread(turns.take)
        if running.done() or not stage._slots.active:
            turns.give()
            break
        had += 1
        positions = [slot.position for slot in stage._slots._slots]
        await asyncio.sleep(0.05)
        assert [slot.position for slot in stage._slots._slots] == positions  # it stands still
        turns.give()
        await until(lambda: stage._slots.active == 0 or turns.wanted or bool(stage.turns and stage.turns.held))
    assert await running == undisturbed
    assert had > 3  # in the middle of windows
    await until(lambda: not cast(GpuTurns, stage.turns).held)
    turns.take()  # a decoder without work does not keep it
