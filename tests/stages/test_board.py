"""What the two ends of a ring tell each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serve_app.stages.board import Board, BoardGone, BoardReader

LEASE_S = 10.0


def test_slots_go_round_and_come_back_when_taken() -> None:
    board = Board(2, b"", LEASE_S)
    reader = BoardReader(board.address)
    assert board.acquire(0) == (0, 1)
    assert board.acquire(0) == (1, 2)
    assert board.acquire(0) is None
    assert reader.take(1, 2)
    assert board.acquire(0) == (1, 3)
    assert not reader.holds(1, 2)


def test_a_lease_ends_and_who_comes_too_late_hears_of_it() -> None:
    board = Board(1, b"", LEASE_S)
    reader = BoardReader(board.address)
    slot, sequence = board.acquire(0) or pytest.fail("no slot")
    assert board.acquire(LEASE_S) is None
    assert reader.holds(slot, sequence)
    assert board.acquire(LEASE_S + 1) == (0, sequence + 1)
    assert not reader.take(slot, sequence)
    assert reader.take(slot, sequence + 1)


def test_the_public_part_arrives_whole() -> None:
    assert BoardReader(Board(3, b"handles" * 9, LEASE_S).address).public == b"handles" * 9


def test_another_board_in_its_place_is_not_mistaken_for_it() -> None:
    address = Board(1, b"", LEASE_S).address
    with pytest.raises(BoardGone, match="another board"):
        BoardReader(replace(address, identity=bytes(16)))
    with pytest.raises(BoardGone, match="no such board"):
        BoardReader(replace(address, file=10**6))


def _hold_board(connection: Connection) -> None:
    board = Board(4, b"public", LEASE_S)
    lent = [board.acquire(0) for _ in range(4)]
    connection.send((board.address, lent))
    connection.recv()
    connection.send(board.acquire(0))
    signal.pause()


def test_across_processes_and_after_the_senders_death() -> None:
    ours, theirs = multiprocessing.Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=_hold_board, args=(theirs,), daemon=True)
    sender.start()
    address, lent = ours.recv()
    reader = BoardReader(address)
    assert reader.public == b"public"
    assert lent == [(i, i + 1) for i in range(4)]
    assert reader.take(2, 3)
    ours.send("taken")
    assert ours.recv() == (2, 5)
    assert not reader.is_gone
    assert sender.pid is not None
    os.kill(sender.pid, signal.SIGKILL)
    sender.join()
    assert reader.is_gone
    assert reader.holds(0, 1)  # the page outlives its owner for those who have it
    with pytest.raises(BoardGone):
        BoardReader(address)


class Traffic(RuleBasedStateMachine):
    """Senders and receivers in any order: no slot is ever lent twice at a time, and none is lost for ever."""

    lent: Bundle[tuple[int, int]] = Bundle("lent")

    def __init__(self) -> None:
        super().__init__()
        self.board = Board(3, b"", LEASE_S)
        self.reader = BoardReader(self.board.address)
        self.now = 0.0
        self.out: dict[int, tuple[int, float]] = {}  # slot: sequence, since
        self.last = 0

    @rule(target=lent)
    def put(self) -> tuple[int, int]:
        given = self.board.acquire(self.now)
        if given is None:
            assert len(self.out) == 3
            assert all(self.now - since <= LEASE_S for _, since in self.out.values())
            return (-1, 0)
        slot, sequence = given
        if slot in self.out:
            before, since = self.out[slot]
            assert self.now - since > LEASE_S
            assert sequence > before
        assert sequence > self.last
        self.last = sequence
        self.out[slot] = sequence, self.now
        return given

    @rule(given=consumes(lent))
    def take(self, given: tuple[int, int]) -> None:
        slot, sequence = given
        if slot < 0:
            return
        current = self.out.get(slot, (0, 0.0))[0]
        assert self.reader.take(slot, sequence) == (current == sequence)
        if current == sequence:
            del self.out[slot]

    @rule(seconds=st.floats(0.1, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def what_is_lent_is_held(self) -> None:
        assert all(self.reader.holds(slot, sequence) for slot, (sequence, _) in self.out.items())

    def teardown(self) -> None:
        self.board.close()


Traffic.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
test_traffic = Traffic.TestCase
