from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from k8s.config import FIXED, ConfigError, ConfigFile, ControllerSettings, parse
from serve_app.scaling.readings import STAGES

LEAST: dict[str, Any] = {
    "namespace": "speech",
    "rayservice": "whisper",
    "lease": "whisper-autoscaler",
    "prometheus_url": "http://prometheus:9090/",
}


def text(**changes: Any) -> str:
    return yaml.safe_dump({**LEAST, **changes})


def test_the_least_that_must_be_said() -> None:
    settings = parse(text())
    assert settings.application == "whisper"
    assert settings.prometheus_url == "http://prometheus:9090"
    assert settings.dashboard("head-svc") == "http://head-svc.speech.svc:8265"
    assert set(settings.gpus) == set(STAGES)


@pytest.mark.parametrize("key", LEAST)
def test_what_must_be_said_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: Field required"):
        parse(yaml.safe_dump({k: v for k, v in LEAST.items() if k != key}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tick": 1}, "tick: Extra inputs are not permitted"),
        ({"namespace": "Speech"}, "namespace: "),
        ({"lease": ""}, "lease: "),
        ({"prometheus_url": "prometheus:9090"}, "is no http or https URL"),
        ({"dashboard_url": "http://{head}:8265"}, "{head} is not known here"),
        ({"prometheus_selector": '{job="x"}'}, "without braces"),
        ({"tick_s": 0}, "tick_s: "),
        ({"signals": "nvml"}, "signals: "),
        ({"gpus": {"encoder": 1.0}}, "gpus names a share for each of features, encoder, decoder"),
        ({"gpus": {**dict.fromkeys(STAGES, 0.3), "decoder": -1}}, "gpus.decoder: "),
        ({"dcgm_selector": 'job="dcgm"'}, "dcgm_selector is for signals: dcgm"),
        ({"scaling": {"sm_utilization": 75}}, "scaling.sm_utilization: "),
        ({"scaling": {"pods": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas"),
    ],
)
def test_what_cannot_be_is_refused_and_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text(**changes))
    assert words in str(error.value)


@given(st.text())
def test_any_other_text_is_refused_as_such(given: str) -> None:
    with pytest.raises(ConfigError):
        parse(given)


def test_every_mistake_has_a_line() -> None:
    with pytest.raises(ConfigError) as error:
        parse(text(tick_s=-1, metrics_port=70_000))
    assert len(str(error.value).splitlines()) == 2


@given(st.sampled_from(["", 'job="a"', 'job="a",pod=~"b.*",']), st.booleans(), st.floats(0.1, 60))
def test_settings_are_read_as_they_are_written(selector: str, dry: bool, tick_s: float) -> None:
    settings = parse(text(prometheus_selector=selector, dry_run=dry, tick_s=tick_s))
    assert settings.prometheus_selector == selector.rstrip(",")
    assert ControllerSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "controller.yaml"
    path.write_text(text())
    return path


def test_a_file_that_is_not_there_or_wrong_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        ConfigFile(tmp_path / "nothing.yaml")
    (tmp_path / "wrong").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        ConfigFile(tmp_path / "wrong")


def test_a_change_is_taken_once(path: Path) -> None:
    file = ConfigFile(path)
    assert not file.reload()
    path.write_text(text(dry_run=True))
    assert file.reload()
    assert file.settings.dry_run
    assert not file.reload()


def test_a_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """As kubelet does it."""
    for number, dry in (("1", False), ("2", True)):
        (tmp_path / number).mkdir()
        (tmp_path / number / "controller.yaml").write_text(text(dry_run=dry))
    (tmp_path / "data").symlink_to("1")
    file = ConfigFile(tmp_path / "data" / "controller.yaml")
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(tmp_path / "data")
    assert file.reload()
    assert file.settings.dry_run


@pytest.mark.parametrize("bad", ["{", "no: keys", text(tick_s=-1), *(text(**{k: "7"}) for k in FIXED), None])
def test_a_bad_change_keeps_what_was_read_before_until_it_is_mended(path: Path, bad: str | None) -> None:
    file = ConfigFile(path)
    before = file.settings
    if bad is None:
        path.unlink()
    else:
        path.write_text(bad)
    for _ in range(2):
        assert not file.reload()
        assert file.error
        assert file.settings == before
    path.write_text(text())
    assert not file.reload()
    assert file.error is None
    path.write_text(text(tick_s=2.0))
    assert file.reload()
