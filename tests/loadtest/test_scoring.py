from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import dataset
from loadtest.scoring import Pair, Score, loops, normalise, score

words = st.lists(st.sampled_from(["stew", "turnips", "carrots", "dinner", "mutton"]), min_size=1, max_size=30)


def test_scores_of_the_baselines_hypotheses_are_those_of_its_table(shared_audio: Path) -> None:
    baseline = dataset.load_baseline(shared_audio)
    groups: dict[tuple[str, str], list[Pair]] = {}
    for recording in dataset.load(shared_audio):
        for model in baseline.models:
            hypothesis = baseline.hypotheses.get((model, recording.file))
            if recording.scored and recording.language is not None and hypothesis is not None:
                for group in dataset.groups(recording):
                    groups.setdefault((model, group), []).append(Pair(recording.text, hypothesis, recording.language))
    assert set(baseline.table) <= set(groups)
    for key, row in baseline.table.items():
        assert score(groups[key]) == Score(row.substitutions, row.deletions, row.insertions, row.words), key


@given(words)
def test_a_text_has_no_errors_against_itself(text: list[str]) -> None:
    assert score([Pair(" ".join(text), " ".join(text), "en")]) == Score(0, 0, 0, len(text))


@given(st.lists(st.tuples(words, words), min_size=2, max_size=5))
def test_a_groups_errors_are_the_sum_of_its_files(texts: list[tuple[list[str], list[str]]]) -> None:
    pairs = [Pair(" ".join(a), " ".join(b), "en") for a, b in texts]
    whole, parts = score(pairs), [score([pair]) for pair in pairs]
    assert whole.errors == sum(part.errors for part in parts)
    assert whole.words == sum(part.words for part in parts)


def test_spelling_and_punctuation_are_no_errors() -> None:
    assert score([Pair("Mister Hale's colour, it's 20.", "mr hale's color it is twenty", "en")]).errors == 0


def test_nothing_heard_loses_every_word() -> None:
    assert score([Pair("stew for dinner", "", "en")]) == Score(0, 3, 0, 3)


def test_chinese_is_compared_in_simplified_script_by_the_character() -> None:
    assert normalise("數據、模型", "zh") == "数 据 模 型"
    assert score([Pair("数据模型", "數據模形", "zh")]) == Score(1, 0, 0, 4)


def test_japanese_is_compared_by_the_character_as_it_is_written() -> None:
    assert normalise("數據。", "ja") == "數 據"


def test_a_reference_without_words_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="without words"):
        score([Pair("[music]", "you", "en")])


def test_an_empty_group_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([])


def test_a_repeated_sentence_is_a_loop() -> None:
    reference = "he hoped there would be stew for dinner"
    assert loops(Pair(reference, " ".join([reference] * 8), "en"))


@given(words, words)
def test_a_transcript_of_its_references_length_is_no_loop(reference: list[str], heard: list[str]) -> None:
    assert not loops(Pair(" ".join(reference), " ".join(heard[: len(reference) + 10]), "en"))
