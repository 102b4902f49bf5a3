"""Tensors from one process to another on one GPU, and the deaths of either."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest
import torch
from torch import Tensor

from serve_app.batching.messages import InputLost
from serve_app.stages.ring import Ring, RingDescriptor, RingReader, gpu_of
from serve_app.stages.transport import Exporter, Receiver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = (1500, 1280)
# each process is a fork of one that has imported much and never touched the GPU: a start is a CUDA context's, no more
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["torch", "serve_app.stages.ring"])


def content(number: int) -> Tensor:
    """A tensor that shows where it is mixed with another."""
    return torch.full(SHAPE, float(number % 1000), device="cuda", dtype=torch.float16)


def send(connection: Connection, slots: int, lease_s: float) -> None:
    """Puts one tensor after the other into a ring and sends (number, descriptor), until the other end is closed."""
    ring = Ring(slots, SHAPE, torch.float16, torch.device("cuda"), lease_s=lease_s)
    for number in itertools.count():
        descriptor = ring.put(content(number), patience_s=10.0)
        assert descriptor is not None
        connection.send((number, descriptor))


@pytest.fixture
def sender() -> Iterator[tuple[ForkServerProcess, Connection]]:
    ours, theirs = START.Pipe()
    process = START.Process(target=send, args=(theirs, 8, 60.0), daemon=True)
    process.start()
    theirs.close()
    yield process, ours
    process.kill()
    process.join()


def test_what_is_read_is_what_was_put(sender: tuple[ForkServerProcess, Connection]) -> None:
    _, connection = sender
    reader = RingReader(torch.device("cuda"))
    for _ in range(50):  # the ring comes round several times
        batch: list[tuple[int, RingDescriptor]] = [connection.recv() for _ in range(4)]
        random.shuffle(batch)
        read = reader.read([descriptor for _, descriptor in batch])
        for (number, _), tensor in zip(batch, read, strict=True):
            assert isinstance(tensor, Tensor)
            assert torch.equal(tensor, content(number))


def test_two_senders_are_read_together_and_of_a_dead_one_is_said_that_it_is(
    sender: tuple[ForkServerProcess, Connection],
) -> None:
    _, connection = sender
    ours, theirs = START.Pipe()
    other = START.Process(target=send, args=(theirs, 4, 60.0), daemon=True)
    other.start()
    reader = RingReader(torch.device("cuda"))
    for _ in range(3):
        batch = [source.recv() for source in (connection, ours, connection)]
        for (number, _), tensor in zip(batch, reader.read([descriptor for _, descriptor in batch]), strict=True):
            assert isinstance(tensor, Tensor)
            assert torch.equal(tensor, content(number))
    number, descriptor = ours.recv()
    other.kill()
    other.join()
    fresh = RingReader(torch.device("cuda"))  # it has not seen the dead one's ring
    alive = connection.recv()
    read = fresh.read([descriptor, alive[1]])
    assert isinstance(read[0], InputLost)
    assert isinstance(read[1], Tensor)
    assert torch.equal(read[1], content(alive[0]))


def test_a_sender_killed_in_mid_copy_harms_nobody(sender: tuple[ForkServerProcess, Connection]) -> None:
    process, connection = sender
    reader = RingReader(torch.device("cuda"))
    number, descriptor = connection.recv()
    assert isinstance(reader.read([descriptor])[0], Tensor)
    time.sleep(random.uniform(0.0, 0.05))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    while True:
        try:
            number, descriptor = connection.recv()
        except (EOFError, OSError):
            break
        (read,) = reader.read([descriptor])
        # NOTES: the copy of what was put last may have died with its sender: the event that the reader waits for was
        # recorded behind it, so that it is lost or whole, never half
        assert isinstance(read, InputLost) or torch.equal(read, content(number))
    process.join()
    # the GPU still computes, and another sender's ring is served
    assert float((torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum()) == 64**3
    ours, theirs = START.Pipe()
    other = START.Process(target=send, args=(theirs, 2, 60.0), daemon=True)
    other.start()
    number, descriptor = ours.recv()
    (read,) = reader.read([descriptor])
    other.kill()
    other.join()
    assert isinstance(read, Tensor)
    assert torch.equal(read, content(number))


def export(connection: Connection) -> None:
    """Exports three results at once through a ring for two: what it can begin, then what it can finish."""
    device = torch.device("cuda")
    exporter = Exporter(device, ring_windows=2)
    results = torch.stack([content(i) for i in range(3)])
    consumers = [{gpu_of(device) or ""}] * 3
    begun = exporter.begin(results, consumers)
    connection.send(begun)
    connection.send(exporter.finish(results, consumers, begun))
    connection.recv()


def test_a_full_ring_waits_until_its_windows_are_read() -> None:
    content(0)  # this process is on the GPU before the sender's patience begins
    ours, theirs = START.Pipe()
    sender = START.Process(target=export, args=(theirs,), daemon=True)
    sender.start()
    theirs.close()  # so that its death is heard of
    begun = ours.recv()
    assert [isinstance(descriptor, RingDescriptor) for descriptor in begun] == [True, True, False]
    receive = Receiver(torch.device("cuda"))
    incoming = [receive(descriptor) for descriptor in begun[:2]]
    assert all(each.is_at_hand and not each.future.done() for each in incoming)
    assert not ours.poll(0.3)
    receive.read_rings()
    finished = ours.recv()
    assert finished[:2] == begun[:2]
    incoming.append(receive(finished[2]))
    receive.read_rings()
    for i, each in enumerate(incoming):
        received = each.future.result(timeout=0)
        assert isinstance(received, Tensor)
        assert torch.equal(received, content(i))
    sender.kill()
    sender.join()


def receive_and_die(descriptors: list[RingDescriptor], ready: Connection, taken: int) -> None:
    """Takes some of what is offered, and is killed in the middle of taking more."""
    reader = RingReader(torch.device("cuda"))
    reader.read(descriptors[:taken])
    ready.send(True)
    while True:
        reader.read(descriptors)


def test_of_a_hundred_receivers_killed_none_costs_a_slot_for_ever() -> None:
    slots, together = 16, 10
    ring = Ring(slots, SHAPE, torch.float16, torch.device("cuda"), lease_s=3.0)
    for round_number in range(100 // together):
        descriptors = [ring.put(content(i), patience_s=20.0) for i in range(slots)]
        assert None not in descriptors, f"a slot was lost before round {round_number}"
        processes = []
        for receiver in range(together):
            ours, theirs = START.Pipe()
            offered = descriptors[receiver::together]
            process = START.Process(target=receive_and_die, args=(offered, theirs, receiver % 2), daemon=True)
            process.start()
            theirs.close()
            processes.append((process, ours))
        for process, ours in processes:
            assert ours.recv()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    assert all(ring.put(content(i), patience_s=20.0) is not None for i in range(slots))
