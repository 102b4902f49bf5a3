"""Turns between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.stages.turns import LONGEST_S, GpuTurns, gives_way

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
