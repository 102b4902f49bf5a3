from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.checkpoint import Dims
from serve_app.engine.memory import (
    MOST_SLOTS,
    MOST_WINDOWS,
    GiB,
    OutOfShare,
    decoder_bytes,
    encoder_bytes,
    features_bytes,
    plan_slots,
    plan_windows,
    slot_bytes,
)
from serve_app.settings import EncoderSettings

LARGE = Dims(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 32)
BASE = Dims(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6)


@given(share_gib=st.floats(0.1, 200), dims=st.sampled_from([LARGE, BASE]), queued=st.integers(1, 2000))
def test_planned_slots_fit_and_one_more_would_not(share_gib: float, dims: Dims, queued: int) -> None:
    share, fixed, each = int(share_gib * GiB), decoder_bytes(dims, 2, queued), slot_bytes(dims, 2)
    assert fixed > decoder_bytes(dims, 2, 0) + queued * 1500 * dims.n_audio_state  # what waits lies there too
    try:
        slots = plan_slots(dims, 2, share, queued)
    except OutOfShare:
        assert fixed + each > share
        return
    assert fixed + slots * each <= share
    assert slots == MOST_SLOTS or fixed + (slots + 1) * each > share


def test_half_of_an_80_gb_card_holds_256_slots_of_large_v3() -> None:
    assert plan_slots(LARGE, 2, 40 * GiB, 256) == 256


def test_states_in_bytes_leave_room_for_more_slots() -> None:
    saved = slot_bytes(LARGE, 2) - slot_bytes(LARGE, 2, state_bits=8)
    assert saved == 1500 * 1280 * 2 - (1500 * 1280 + 1500 * 1280 // 64 * 2)  # a scale of two bytes for 64 numbers
    share = 10 * GiB
    assert plan_slots(BASE, 2, share // 4, 256, state_bits=8) > plan_slots(BASE, 2, share // 4, 256)


def test_wanted_slots_are_had_or_refused_with_what_they_need() -> None:
    assert plan_slots(LARGE, 2, 40 * GiB, 256, 64) == 64
    with pytest.raises(OutOfShare, match=r"a decoder with 256 slots needs 2\d\.\d GiB .*, its share is 10\.0 GiB"):
        plan_slots(LARGE, 2, 10 * GiB, 256, 256)
    with pytest.raises(OutOfShare, match="a decoder with 1 slots needs"):
        plan_slots(LARGE, 2, 1 * GiB, 256)


def test_the_other_stages_fit_their_default_shares_of_an_80_gb_card() -> None:
    encoder = EncoderSettings()
    waiting = encoder.ring_windows, encoder.max_queued_windows
    assert encoder_bytes(LARGE, 2, MOST_WINDOWS, *waiting) < 0.4 * 79 * GiB
    assert features_bytes(LARGE, 2, 16, 64) < 0.1 * 79 * GiB
    assert encoder_bytes(LARGE, 2, 32, 64, 256) > encoder_bytes(LARGE, 2, 16, 64, 256)


@given(share_gib=st.floats(0.1, 20), dims=st.sampled_from([LARGE, BASE]))
def test_planned_windows_fit_and_twice_as_many_would_not(share_gib: float, dims: Dims) -> None:
    share = int(share_gib * GiB)
    try:
        windows = plan_windows(dims, 2, share, 64, 256)
    except OutOfShare:
        assert encoder_bytes(dims, 2, 1, 64, 256) > share
        return
    assert encoder_bytes(dims, 2, windows, 64, 256) <= share
    assert windows == MOST_WINDOWS or encoder_bytes(dims, 2, 2 * windows, 64, 256) > share


def test_wanted_windows_are_had_or_refused_with_what_they_need() -> None:
    assert plan_windows(LARGE, 2, 40 * GiB, 64, 256, 48) == 48
    with pytest.raises(OutOfShare, match=r"batches of 32 windows needs 6\.0 GiB .*, its share is 5\.0 GiB"):
        plan_windows(LARGE, 2, 5 * GiB, 64, 256, 32)
    with pytest.raises(OutOfShare, match="batches of 1 windows needs"):
        plan_windows(LARGE, 2, 1 * GiB, 64, 256)
