from __future__ import annotations

import base64
import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s.kept import MOST_BYTES, Kept, pack, unpack
from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.policy import State, UnitState, decide
from serve_app.scaling.readings import STAGES
from tests.scaling.test_policy import NOW, config, reading, settled, signals

KEPT = Kept(NOW, config(), dict.fromkeys(STAGES, 3), settled(3, 0.7, config(), 60))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.floats(0.05, 1.0), st.sampled_from(["split", "colocated"]), st.integers(1, 30))
def test_a_state_comes_back_as_it_was_and_goes_on(count: int, used: float, topology: str, seconds: int) -> None:
    asked = config(topology=topology)
    state = settled(count, used, asked, seconds)
    kept = Kept(NOW, asked, dict.fromkeys(STAGES, count), state)
    found = unpack(pack(kept))
    assert found == kept
    seen = signals(count, reading(NOW, used=used))
    assert decide(found.config, found.state, seen, NOW) == decide(asked, state, seen, NOW)


def test_hours_of_learning_fit_in_an_annotation() -> None:
    assert len(pack(replace(KEPT, state=settled(3, 0.7, config(), 600)))) < 8_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no base64 !",
        base64.b64encode(b"no zlib").decode(),
        base64.b64encode(zlib.compress(b"{}")).decode(),
        base64.b64encode(zlib.compress(b" " * (MOST_BYTES + 1))).decode(),
        pack(KEPT)[:-8],
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(text)


def test_what_is_too_large_is_not_left() -> None:
    noise = {random.randbytes(100).hex(): UnitState() for _ in range(1000)}
    with pytest.raises(ValueError, match="characters"):
        pack(Kept(NOW, ScalingSettings(), {}, State(noise)))
