"""What the mounts share: the policy with its state and its log, and what they tell of a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.scaling.changes import changes, expected
from serve_app.scaling.decider import Decider
from serve_app.scaling.policy import LEARNED_FOR, PODS, State, carried, decide
from serve_app.scaling.readings import STAGES
from serve_app.scaling.replay import read, replay
from tests.scaling.test_policy import NOW, config, reading, settled, signals

OTHERS: dict[str, list[Any]] = {
    "topology": ["colocated"],
    "cold_start_s": [10.0, 200.0],
    "down_hold_s": [5.0, 500.0],
    "objective_wait_s": [1.0, 9.0],
    "sm_utilization": [0.5, 0.9],
    "gpu_budget": [2.0],
    "up_hold_s": [0.0, 4.0],
    "panic_window_s": [1.0],
    "stale_after_s": [30.0],
}
CHANGES = st.dictionaries(st.sampled_from(sorted(OTHERS)), st.integers(0, 1)).map(
    lambda picked: {name: OTHERS[name][index % len(OTHERS[name])] for name, index in picked.items()}
)


@settings(max_examples=50, deadline=None)
@given(CHANGES, st.floats(0.1, 1.0), st.booleans())
def test_whatever_changes_the_policy_goes_on(changed: dict[str, Any], used: float, back: bool) -> None:
    before, after = config(), config(**changed)
    if back:
        before, after = after, before
    state = carried(settled(3, used, before, 30), before, after)
    _, decision = decide(after, state, signals(3, reading(NOW + 1, used=used)), NOW + 1)
    assert set(decision.targets) == set(STAGES)
    if set(changed) & set(LEARNED_FOR):
        assert state == State()


def test_another_threshold_counts_at_once_and_other_changes_cost_nothing() -> None:
    before = config()
    state = settled(3, 0.5, before, 60)
    assert carried(state, before, config(gpu_budget=9.0)) == state
    after = config(sm_utilization=0.5)
    moved = carried(state, before, after)
    assert moved != state
    assert {name: unit.rate for name, unit in moved.units.items()} == {n: u.rate for n, u in state.units.items()}
    new, _ = decide(after, moved, signals(3, reading(NOW + 1, used=0.5)), NOW + 1)
    for unit in new.units.values():
        assert unit.choice is not None
        assert unit.choice.headroom == pytest.approx(2.0)


def test_a_log_goes_on_over_a_change_of_settings_and_of_who_decides(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def drive(decider: Decider, start: float) -> None:
        for second in range(40):
            at = start + second
            decider.decide(signals(3, reading(at, used=0.9, bound=True)), at)

    decider = Decider(config(decision_log=log))
    drive(decider, NOW)
    decider.reconfigure(config(decision_log=log, sm_utilization=0.5))
    drive(decider, NOW + 40)
    drive(Decider(config(decision_log=log), decider.state), NOW + 80)
    assert sum(1 for _ in read(log)) == 3 * 41
    assert replay(log) == (120, [])


def test_a_log_that_cannot_be_written_is_an_error_before_anything_is_decided(tmp_path: Path) -> None:
    decider = Decider(config(decision_log=tmp_path / "nowhere" / "log"))
    with pytest.raises(OSError, match="nowhere"):
        decider.decide(signals(1, reading(NOW)), NOW)
    assert decider.state == State()


@pytest.mark.parametrize("topology", ["split", "colocated"])
def test_every_stage_is_told_of_with_its_reason(topology: str) -> None:
    asked = config(topology=topology)
    seen = signals(3, reading(NOW, used=0.95, queued_s=9_000.0, bound=True))
    state = settled(3, 0.6, asked)
    for second in range(5):
        state, decision = decide(asked, state, signals(3, reading(NOW + second, used=1.0, queued_s=9e3)), NOW + second)
    told = changes(seen, decision)
    assert [each.stage for each in told] == list(STAGES)
    for each in told:
        unit = decision.units[each.stage if topology == "split" else PODS]
        assert (each.before, each.ready, each.target) == (3, 3, decision.targets[each.stage])
        assert (each.reason, each.words) == (unit.reason, unit.words)
        assert each.direction == {-1: "down", 0: "hold", 1: "up"}[(each.target > 3) - (each.target < 3)]
        assert str(each).startswith(f"{each.stage}: 3 → {each.target} replicas ({each.reason}): ")
    assert any(each.direction == "up" for each in told)


def test_counters_are_there_for_each_stage() -> None:
    assert len(set(expected())) == len(list(expected())) == 6 * len(STAGES)
