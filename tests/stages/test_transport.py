"""Results in the object store outlive the moment in which only their producer knows of them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.stages import transport
from serve_app.stages.transport import Exporter, StoredDescriptor


def test_a_producer_keeps_what_it_has_just_exported(ray_cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now))
    export = Exporter(torch.device("cpu"), ring_windows=0)

    def exported(count: int) -> list[Any]:
        return export(torch.zeros(count, 3), [()] * count)

    first, second = exported(2)
    assert isinstance(first, StoredDescriptor)
    assert [descriptor for _, descriptor in export._kept] == [first, second]
    now += transport.KEPT_S / 2
    (third,) = exported(1)
    assert len(export._kept) == 3
    now += transport.KEPT_S * 0.75
    (fourth,) = exported(1)
    assert [descriptor for _, descriptor in export._kept] == [third, fourth]
