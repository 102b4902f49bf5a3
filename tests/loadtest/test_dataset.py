from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from loadtest import dataset, hostile, speed, wer


@pytest.mark.parametrize("command", [wer, speed, hostile])
def test_without_the_recordings_a_command_says_so_and_ends_with_status_2(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--audio", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert f"the set of recordings is not at {tmp_path}" in capsys.readouterr().err


def test_every_recording_of_the_manifest_exists(shared_audio: Path) -> None:
    assert all(recording.path.is_file() for recording in dataset.load(shared_audio))


def test_recordings_without_speech_have_no_language(shared_audio: Path) -> None:
    silent = dataset.select(dataset.load(shared_audio), "nospeech")
    assert len(silent) == 8
    assert {recording.language for recording in silent} == {None}


def test_groups_have_the_sizes_of_the_baseline(shared_audio: Path) -> None:
    scored = [recording for recording in dataset.load(shared_audio) if recording.scored]
    sizes = Counter(group for recording in scored for group in dataset.groups(recording))
    assert sizes["en_short/ALL"] == 88
    assert sizes["en_short/librispeech-test-other"] == 50
    assert sizes["en_short/ljspeech"] == 25
    assert sizes["en_noisy"] == 12
    assert sizes["en_long/ALL"] == sizes["synth_long/ALL"] == 2


def test_the_baseline_has_a_hypothesis_for_every_scored_english_recording(shared_audio: Path) -> None:
    baseline = dataset.load_baseline(shared_audio)
    assert baseline.models == ["base", "tiny.en"]
    for recording in dataset.load(shared_audio):
        if recording.scored and recording.language == "en" and recording.category != "formats":
            for model in baseline.models:
                assert (model, recording.file) in baseline.hypotheses
