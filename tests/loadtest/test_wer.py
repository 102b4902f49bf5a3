from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import dataset, wer
from loadtest.dataset import Baseline, Recording
from loadtest.scoring import Score
from tests.loadtest.answering import Answer, answering

KNOWN = ["base", "tiny.en"]


def recording(file: str, text: str, category: str = "en_short", language: str | None = "en") -> Recording:
    return Recording(Path(file), file, 1.0, language, text, "LJ Speech", category, language is not None)


def row(group: str, ours: int, baseline: int, words: int = 1000) -> wer.Row:
    return wer.Row(group, 1, Score(ours, 0, 0, words), Score(baseline, 0, 0, words))


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["embedded:base"], "base"),
        (["embedded:tiny.en"], "tiny.en"),
        (["whisper-1", "whisper-base"], "base"),
        (["openai/whisper-tiny.en"], "tiny.en"),
        (["base"], "base"),
        (["large-v3"], None),
        (["base.en"], None),
        (["database"], None),
        ([], None),
    ],
)
def test_a_model_is_known_by_any_of_its_names(names: list[str], model: str | None) -> None:
    assert wer.baseline_model(names, KNOWN) == model


def test_an_english_model_is_sent_no_other_language() -> None:
    english, swedish = recording("a", "stew"), recording("b", "hej", "multilingual", "sv")
    silence = recording("c", "", "nospeech", None)
    everything = [english, swedish, silence]
    assert wer.selected(everything, wer.CATEGORIES, "tiny.en") == [english, silence]
    assert wer.selected(everything, wer.CATEGORIES, "base") == everything
    assert wer.selected(everything, ["multilingual"], "base") == [swedish]


def test_a_row_tells_the_difference_in_words_and_in_points() -> None:
    texts = {"a": "stew for dinner", "b": "turnips and"}
    recordings = [recording("a", "stew for dinner"), recording("b", "turnips and carrots")]
    baseline = Baseline({("base", "a"): "stew for dinner", ("base", "b"): ""}, {})
    table, looping = wer.rows(recordings, texts, baseline, "base")
    assert [r.group for r in table] == ["en_short/ALL", "en_short/ljspeech"]
    assert (table[0].files, table[0].ours.errors, table[0].baseline.errors, table[0].words) == (2, 1, 3, -2)
    assert table[0].points == pytest.approx(-100 * 2 / 6)
    assert looping == []


@pytest.mark.parametrize(
    ("measured", "reached"),
    [
        (row("en_short/ALL", 92, 89), True),
        (row("en_short/ALL", 93, 89), False),
        (row("en_noisy", 39, 36), True),
        (row("en_noisy", 40, 36), False),
        (row("en_long/ALL", 45, 40), True),
        (row("en_long/ALL", 46, 40), False),
        (row("synth_long/ALL", 50, 45), True),
        (row("synth_long/ALL", 51, 45), False),
    ],
)
def test_a_goal_is_reached_up_to_its_limit(measured: wer.Row, reached: bool) -> None:
    assert wer.verdicts([measured], [], {})[0].reached == reached


def test_other_languages_are_reported_without_a_goal() -> None:
    assert [v.goal for v in wer.verdicts([row("multi/sv", 13, 2)], [], {})] == ["no transcript loops"]


def test_text_where_nobody_speaks_misses_the_goal() -> None:
    missed = wer.verdicts([], [], {"silence.flac": " you", "hum.flac": " "})[-1]
    assert not missed.reached
    assert missed.measured == "silence.flac: 'you'"
    assert wer.verdicts([], [], {"silence.flac": " "})[-1].reached


def test_a_looping_transcript_misses_the_goal() -> None:
    assert not wer.verdicts([], ["pause.flac"], {})[0].reached


def answers_of_the_baseline(shared_audio: Path) -> dict[str, str]:
    hypotheses = dataset.load_baseline(shared_audio).hypotheses
    return {Path(file).name: text for (model, file), text in hypotheses.items() if model == "base"}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["wer", *arguments])
    return wer.main()


def test_a_server_that_writes_what_the_baseline_wrote_differs_by_nothing(
    shared_audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = answers_of_the_baseline(shared_audio)
    out = tmp_path / "wer.json"
    with answering(lambda name, body: (200, {"text": texts[name]})) as url:
        status = command(
            monkeypatch,
            "--url",
            url,
            "--categories",
            "en_short",
            "en_noisy",
            "en_long",
            "synth_long",
            "--json",
            str(out),
        )
    assert status == 0
    [run] = json.loads(out.read_text())["runs"]
    assert {group["group"]: group["files"] for group in run["groups"]}["en_short/ALL"] == 88
    assert all(group["ours"] == group["baseline"] for group in run["groups"])
    assert len(run["goals"]) == 5
    assert len(run["files"]) == 88 + 12 + 2 + 2


def test_a_server_that_hears_voices_in_silence_misses_a_goal(
    shared_audio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = answers_of_the_baseline(shared_audio)
    with answering(lambda name, body: (200, {"text": texts[name]})) as url:
        assert command(monkeypatch, "--url", url, "--categories", "nospeech") == 1
    assert "silence_60s.flac: 'you you'" in capsys.readouterr().out


def test_a_request_that_fails_is_named_and_nothing_is_scored(
    shared_audio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def transcribe(name: str, body: bytes) -> Answer:
        if name == "hum50_30s.flac":
            return 500, {"error": {"message": "a window could not be transcribed"}}
        return 200, {"text": ""}

    with answering(transcribe) as url:
        assert command(monkeypatch, "--url", url, "--categories", "nospeech") == 1
    assert "nospeech/hum50_30s.flac: status 500 a window could not be transcribed" in capsys.readouterr().err


def test_a_server_of_an_unknown_model_needs_to_be_told_its_baseline(
    shared_audio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(lambda name, body: (200, {"text": ""}), model="large-v3") as url:
        assert command(monkeypatch, "--url", url, "--categories", "nospeech") == 1
        assert "--baseline" in capsys.readouterr().err
        assert command(monkeypatch, "--url", url, "--categories", "nospeech", "--baseline", "base") == 0
