"""What travels between a caller's batching handle and a stage's replicas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.engine.options import DecodeOptions, Priority


@dataclass(frozen=True, slots=True)
class StageWindow:
    """One window's work for one stage.

    window_id: unique among all windows under way. input: what the stage works on: samples, or a tensor's descriptor
    (``stages.transport``). cost: in the stage's own unit. deadline: seconds since the epoch, since it crosses machines.
    seconds: of audio in it. options: how to decode, for the decoder. alone: share no batch. gpu: the GPU in whose
    memory the input lies; only replicas there can take it. consumers: GPUs on which the next stage has replicas.
    """

    window_id: str
    input: Any
    cost: float
    deadline: float
    priority: Priority = "normal"
    seconds: float = 0.0
    options: DecodeOptions | None = None
    alone: bool = False
    gpu: str | None = None
    consumers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Started:
    """A window that runs alone runs from now on: if the replica dies now, it is the reason. Of windows that run
    together any may be the reason, so nothing is said of them."""

    window_id: str


@dataclass(frozen=True, slots=True)
class Done:
    window_id: str
    result: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The window cannot be done; trying again elsewhere would not help."""

    window_id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Refused:
    """The replica's queue is full, or it is about to stop: to be sent again, later or elsewhere."""

    window_ids: list[str]


Event = Started | Done | Failed | Refused


class Cancelled(Exception):
    """The window was cancelled; its caller does not wait any more."""


class InputLost(Exception):
    """A window's input can no longer be fetched, because the replica that made it has died: make it again."""


@dataclass(slots=True)
class StageCall:
    """Several windows in one call, which streams an ``Event`` as each changes state."""

    windows: list[StageWindow] = field(default_factory=list)
