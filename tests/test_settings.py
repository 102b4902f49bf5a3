from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.settings import CONFIG_FILE_VARIABLE, Settings


def test_the_environment_sets_nested_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPER_SERVE_DECODER__SLOTS", "3")
    assert Settings().decoder.slots == 3


def test_a_file_sets_values_and_the_environment_and_arguments_go_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("decoder: {slots: 5, replicas: 2}\nencoder: {replicas: 3}\nhttp: {port: 9000}\n")
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(config))
    monkeypatch.setenv("WHISPER_SERVE_DECODER__SLOTS", "7")
    settings = Settings(http={"port": 9001})
    assert (settings.decoder.slots, settings.decoder.replicas) == (7, 2)
    assert (settings.encoder.replicas, settings.http.port) == (3, 9001)


@pytest.mark.parametrize(
    "given",
    [
        {"decoder": {"slots": 0}},
        {"decoder": {"max_tokens": 0}},
        {"decoder": {"slotz": 4}},
        {"no_such_section": {}},
        {"http": {"port": 70000}},
        {"encoder": {"num_gpus": -1}},
        {"audio": {"min_sample_rate": 96_000, "max_sample_rate": 8_000}},
        {"decoder": {"state_bits": 4}},
        {"decoder": {"state_bits": 8}, "model": {"device": "cpu"}},
        {"decoder": {"state_bits": 8}, "model": {"compute": "bfloat16"}},
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**given)


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("decoder: {slotz: 5}\n")
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(config))
    with pytest.raises(ValidationError, match="slotz"):
        Settings()


def test_a_config_file_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, "/nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"/nowhere\.yaml"):
        Settings()


def test_defaults_that_depend_on_the_machine_are_filled_in() -> None:
    cpu, gpu = Settings().filled(on_gpu=False), Settings().filled(on_gpu=True)
    assert (cpu.decoder.slots, cpu.decoder.num_gpus, cpu.encoder.budget_windows) == (16, 0.0, 4)
    assert (gpu.decoder.slots, gpu.decoder.num_gpus, gpu.encoder.budget_windows) == (None, 0.5, None)
    assert sum(stage.num_gpus or 0 for stage in (gpu.features, gpu.encoder, gpu.decoder)) == 1.0


@pytest.mark.parametrize(
    ("cores", "on_gpu", "expected"), [(1, True, 1), (16, True, 12), (64, True, 12), (64, False, 1)]
)
def test_a_gpu_is_kept_at_work_by_several_api_replicas(
    cores: int, on_gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert Settings().filled(on_gpu=on_gpu).http.replicas == expected


def test_states_in_bytes_are_for_gpus() -> None:
    in_bytes = Settings.model_validate({"decoder": {"state_bits": 8}})
    assert in_bytes.filled(on_gpu=True).decoder.state_bits == 8
    with pytest.raises(ValueError, match="needs a GPU"):
        in_bytes.filled(on_gpu=False)


def test_what_is_set_stays() -> None:
    fixed = {"decoder": {"slots": 7, "num_gpus": 0.25}, "encoder": {"budget_windows": 1}, "http": {"replicas": 2}}
    given = Settings.model_validate(fixed).filled(on_gpu=True)
    assert given.http.replicas == 2
    assert (given.decoder.slots, given.decoder.num_gpus, given.encoder.budget_windows) == (7, 0.25, 1)
