"""Results in the object store outlive the moment when only their producer knows of them; what stays away is lost."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from serve_app.batching.messages import InputLost
from serve_app.stages import transport
from serve_app.stages.transport import Exporter, Receiver, StoredDescriptor, export


def test_a_producer_keeps_what_it_has_just_exported(ray_cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now))
    export = Exporter(torch.device("cpu"), ring_windows=0)

    def exported(count: int) -> list[Any]:
        tensors, consumers = torch.zeros(count, 3), [()] * count
        begun = export.begin(tensors, consumers)
        assert begun == [None] * count  # there is no ring on a CPU
        return export.finish(tensors, consumers, begun)

    first, second = exported(2)
    assert isinstance(first, StoredDescriptor)
    assert [descriptor for _, descriptor in export._kept] == [first, second]
    now += transport.KEPT_S / 2
    (third,) = exported(1)
    assert len(export._kept) == 3
    now += transport.KEPT_S * 0.75
    (fourth,) = exported(1)
    assert [descriptor for _, descriptor in export._kept] == [third, fourth]


async def received(descriptors: list[StoredDescriptor]) -> list[Any]:
    receive = Receiver(torch.device("cpu"))
    incoming = [receive(descriptor) for descriptor in descriptors]
    assert not any(each.in_ring or each.is_at_hand for each in incoming)
    inputs = await asyncio.gather(*(asyncio.wrap_future(each.future) for each in incoming))
    assert all(each.is_at_hand for each in incoming)
    return inputs


def test_an_input_that_does_not_come_is_lost(ray_cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PATIENCE_S", 0.3)

    @ray.remote(num_cpus=0)
    def never() -> None:
        time.sleep(60)

    pending = never.remote()
    here = export(torch.ones(3))
    try:
        began = time.monotonic()
        inputs = asyncio.run(received([StoredDescriptor(pending), here, StoredDescriptor(pending)]))
        assert time.monotonic() - began < 5  # they are waited for together
    finally:
        ray.cancel(pending, force=True)
    assert [isinstance(each, InputLost) for each in inputs] == [True, False, True]


def test_samples_are_at_hand_as_they_come() -> None:
    samples = np.arange(3, dtype=np.int16)
    incoming = Receiver(torch.device("cpu"))(samples)
    assert incoming.is_at_hand
    assert not incoming.in_ring
    assert incoming.future.result(timeout=0) is samples
