from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from loadtest.gpu import __main__ as command
from loadtest.gpu.run import SYSTEMS, Run, run
from loadtest.gpu.work import NEW_TOKENS
from loadtest.gpu.worker import Job, has_fallen_twice, measure, reason_to_stop
from tests.loadtest.gpu_systems import SMALL


def job(system: str, *batches: int, seconds: float = 60.0) -> Job:
    return Job(f"tests.loadtest.gpu_systems:{system}", SMALL, batches, seconds=seconds, device="cpu")


def measured_here(job: Job) -> Run:
    events: list[dict[str, Any]] = []
    measure(job, events.append)
    result = Run("small", "one")
    result.read(events)
    return result


def test_a_system_is_measured_in_a_process_of_its_own() -> None:
    result = run("small", "good", job("Good", 1, 2))
    assert result.error is None
    assert result.name == "good"
    assert [size.batch for size in result.sizes] == [1, 2]
    assert [len(size.seconds) for size in result.sizes] == [3, 1]
    assert result.sizes[0].tokens == [" ".join(["1000"] * NEW_TOKENS)]


def test_a_crash_costs_only_what_comes_after_it() -> None:
    result = run("small", "crashing", job("Crashing", 1, 2, 4))
    assert [size.batch for size in result.sizes] == [1]
    assert result.error is not None
    assert "SIGSEGV" in result.error


def test_a_system_that_hangs_is_killed() -> None:
    result = run("small", "hanging", job("Hanging", 1, 2, seconds=10.0))
    assert [size.batch for size in result.sizes] == [1]
    assert result.error is not None
    assert "killed after" in result.error


def test_a_system_that_cannot_be_loaded_says_why() -> None:
    result = run("small", "unloadable", job("Unloadable", 1))
    assert result.sizes == []
    assert result.error is not None
    assert "the library is not here" in result.error


def test_no_larger_batch_is_tried_once_memory_is_full() -> None:
    result = measured_here(job("Greedy", 1, 2, 4, 8))
    assert [size.batch for size in result.sizes] == [1, 2]
    assert list(result.left_out) == [4]
    assert "out of memory" in result.left_out[4]


def test_work_that_was_not_done_has_no_figure() -> None:
    result = measured_here(job("Short", 1, 2))
    assert [size.batch for size in result.sizes] == [1]
    assert "shape" in result.left_out[2]


def test_no_size_is_begun_for_which_there_is_no_time() -> None:
    assert reason_to_stop([1.0, 4.0], least_s=7.0, seconds_left=8.0) is None
    assert reason_to_stop([1.0, 4.0], least_s=9.0, seconds_left=8.0) == "at least 9 s wanted, 8 s left"
    assert reason_to_stop([], least_s=0.0, seconds_left=-1.0) is not None


@pytest.mark.parametrize(
    ("rates", "fallen"),
    [([], False), ([3, 2], False), ([3, 2, 1], True), ([3, 2, 4], False), ([1, 3, 2, 2.5], True), ([1, 2, 3], False)],
)
def test_throughput_has_fallen_twice_when_two_sizes_stay_below_the_best(rates: list[float], fallen: bool) -> None:
    assert has_fallen_twice(rates) == fallen


def test_models_systems_and_batches_are_chosen_on_the_command_line() -> None:
    options = command.parse(["--models", "turbo", "--systems", "openai,mine=a.b:C"])
    assert options.models == ["turbo"]
    assert options.systems == {"openai": SYSTEMS["openai"], "mine": "a.b:C"}


@pytest.mark.parametrize(
    ("model", "system", "batches"),
    [
        ("turbo", "engine", (1, 64)),
        ("large-v3", "engine", (1, 192)),
        ("large-v3", "openai", (1, 128)),
        ("turbo", "openai", (256,)),
    ],
)
def test_the_most_particular_batches_hold(model: str, system: str, batches: tuple[int, ...]) -> None:
    asked = ["64,1", "large-v3=1,192", "openai=1,128", "turbo/openai=256"]
    options = command.parse([part for text in asked for part in ("--batches", text)])
    assert command.batches_of(options.batches, model, system) == batches


def test_all_batches_are_run_unless_others_are_asked_for() -> None:
    assert command.batches_of(command.parse([]).batches, "turbo", "engine") == command.BATCHES


@pytest.mark.parametrize(
    ("read", "text"), [(command._models, "huge"), (command._systems, "nobody"), (command._batches, "0,1")]
)
def test_what_is_unknown_is_refused(read: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_what_the_time_for_all_does_not_reach_is_named() -> None:
    kept: list[list[Run]] = []
    options = command.parse(["--models", "turbo", "--systems", "openai,engine", "--budget-seconds", "0"])
    command.measure(options, lambda text: pytest.fail(text), lambda runs: kept.append(list(runs)))
    assert [one.system for one in kept[-1]] == ["openai", "engine"]
    assert all(one.error is not None and "not begun" in one.error for one in kept[-1])
