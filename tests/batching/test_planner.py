from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.batching.planner import PATIENCE_S, Waiting, expired, plan


@st.composite
def waitings(draw: st.DrawFn, *, alone: bool = True) -> list[Waiting]:
    count = draw(st.integers(0, 30))
    return [
        Waiting(
            window_id=str(i),
            cost=draw(st.floats(0.1, 100)),
            arrived=draw(st.floats(0, 1000)),
            deadline=draw(st.floats(0, 2000)),
            priority=draw(st.sampled_from(["interactive", "normal", "batch"])),
            alone=alone and draw(st.booleans()),
        )
        for i in range(count)
    ]


BUDGETS = st.floats(0.1, 1000)


@given(waitings(), BUDGETS, st.booleans())
def test_a_batch_holds_windows_that_wait_each_once(waiting: list[Waiting], budget: float, padded: bool) -> None:
    batch = plan(waiting, budget=budget, padded=padded)
    assert len({w.window_id for w in batch}) == len(batch)
    assert set(batch) <= set(waiting)
    assert bool(batch) == bool(waiting)


@given(waitings(), BUDGETS)
def test_a_padded_batch_fits_the_budget_or_is_one_window(waiting: list[Waiting], budget: float) -> None:
    batch = plan(waiting, budget=budget)
    assert len(batch) <= 1 or len(batch) * max(w.cost for w in batch) <= budget


@given(waitings(), BUDGETS)
def test_an_unpadded_batch_fits_the_budget_or_is_one_window(waiting: list[Waiting], budget: float) -> None:
    batch = plan(waiting, budget=budget, padded=False)
    assert len(batch) <= 1 or sum(w.cost for w in batch) <= budget * (1 + 1e-9)


@given(waitings(), BUDGETS, st.booleans())
def test_the_most_urgent_window_is_always_taken(waiting: list[Waiting], budget: float, padded: bool) -> None:
    batch = plan(waiting, budget=budget, padded=padded)
    assert all(batch[0].due <= w.due for w in waiting)


@given(waitings(), BUDGETS, st.booleans())
def test_a_window_that_must_run_alone_shares_no_batch(waiting: list[Waiting], budget: float, padded: bool) -> None:
    batch = plan(waiting, budget=budget, padded=padded)
    assert len(batch) <= 1 or not any(w.alone for w in batch)


@given(waitings(alone=False), BUDGETS)
def test_no_window_is_left_out_of_an_unpadded_batch_that_has_room(waiting: list[Waiting], budget: float) -> None:
    batch = plan(waiting, budget=budget, padded=False)
    room = budget - sum(w.cost for w in batch)
    assert all(w.cost > room for w in waiting if w not in batch)


@given(waitings(), st.floats(0, 2000))
def test_expired_windows_are_those_past_their_deadline(waiting: list[Waiting], now: float) -> None:
    late = expired(waiting, now)
    assert all(w.deadline <= now for w in late)
    assert all(w.deadline > now for w in waiting if w not in late)


def test_a_window_of_any_priority_is_served_in_time_however_many_urgent_ones_arrive() -> None:
    now, served_at = 0.0, None
    queue = [Waiting("patient", 1.0, arrived=0.0, deadline=1e9, priority="batch")]
    while served_at is None and now < 10 * PATIENCE_S["batch"]:
        # a flood: each second one more urgent window arrives than the replica can serve
        queue += [Waiting(f"{now}-{i}", 1.0, now, now + 1e9, "interactive") for i in range(3)]
        batch = plan(queue, budget=2)
        queue = [w for w in queue if w not in batch]
        served_at = now if any(w.window_id == "patient" for w in batch) else None
        now += 1.0
    # the interactive windows that arrived before its due time are served first, and no others
    assert served_at is not None
    assert served_at <= 1.5 * PATIENCE_S["batch"] + 1


def test_urgent_windows_overtake_patient_ones() -> None:
    patient = Waiting("patient", 1.0, arrived=0.0, deadline=1e9, priority="batch")
    urgent = Waiting("urgent", 1.0, arrived=5.0, deadline=1e9, priority="interactive")
    assert plan([patient, urgent], budget=1)[0] is urgent


def test_a_near_deadline_overtakes() -> None:
    calm = Waiting("calm", 1.0, arrived=0.0, deadline=1e9)
    pressed = Waiting("pressed", 1.0, arrived=5.0, deadline=6.0)
    assert plan([calm, pressed], budget=1)[0] is pressed


def test_similar_lengths_are_batched_together_before_others() -> None:
    head = Waiting("head", 30.0, arrived=0.0, deadline=1e9)
    short = Waiting("short", 2.0, arrived=1.0, deadline=1e9)
    long = Waiting("long", 28.0, arrived=2.0, deadline=1e9)
    assert plan([head, short, long], budget=60) == [head, long]
