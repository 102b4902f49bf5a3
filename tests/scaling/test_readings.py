from __future__ import annotations

import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.scaling.readings import STAGES, CallerReading, ReplicaReading, decode, encode

SHARES = st.floats(0, 1)
NUMBERS = st.floats(0, 1e6)
COUNTS = st.integers(0, 10**6)

REPLICAS = st.builds(
    ReplicaReading,
    at=NUMBERS,
    busy=SHARES,
    gpu_share=st.none() | SHARES,
    sm_utilization=st.none() | SHARES,
    dram_utilization=st.none() | SHARES,
    saturation=SHARES,
    fill=SHARES,
    queued_windows=COUNTS,
    queued_s=NUMBERS,
    oldest_wait_s=NUMBERS,
    running_windows=COUNTS,
    rate=st.none() | NUMBERS,
    budget_at_bound=st.booleans(),
    done_s=NUMBERS,
    gpu=st.none() | st.uuids().map(str),
)
OF_TYPE = {"int": COUNTS, "float": NUMBERS, "float | None": st.none() | NUMBERS}
CALLERS = st.builds(CallerReading, **{f.name: OF_TYPE[str(f.type)] for f in fields(CallerReading)})


SERVES_OWN = {"ray_io_serve_running_requests": 3.0}


@given(REPLICAS)
def test_a_replicas_reading_comes_back_as_it_was(reading: ReplicaReading) -> None:
    assert all(type(value) is float for value in encode(reading).values())
    assert decode(ReplicaReading, encode(reading) | SERVES_OWN) == reading


def test_a_gpu_without_a_uuid_is_refused() -> None:
    reading = ReplicaReading(0, 0, None, None, None, 1, 0, 0, 0, 0, 0, None, False, 0, gpu="cuda:0")
    with pytest.raises(ValueError, match="UUID"):
        encode(reading)


@given(CALLERS)
def test_a_callers_reading_comes_back_as_it_was(reading: CallerReading) -> None:
    assert decode(CallerReading, encode(reading) | SERVES_OWN) == reading


@given(REPLICAS, st.data())
def test_what_is_missing_is_named(reading: ReplicaReading, data: st.DataObject) -> None:
    encoded = encode(reading)
    lost = data.draw(st.sampled_from(sorted(encoded)))
    del encoded[lost]
    with pytest.raises(ValueError, match=lost):
        decode(ReplicaReading, encoded)


@pytest.mark.parametrize("name", ["at", "busy", "queued_windows", "budget_at_bound"])
@given(REPLICAS)
def test_what_must_be_known_is_not_taken_unknown(name: str, reading: ReplicaReading) -> None:
    with pytest.raises(ValueError, match=name):
        decode(ReplicaReading, encode(reading) | {name: math.nan})


def test_callers_tell_of_every_stage() -> None:
    names = {field.name for field in fields(CallerReading)}
    assert {f"{stage}_{what}" for stage in STAGES for what in ("windows", "s", "oldest_wait_s")} <= names
