from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.next_token import Field, NextToken, new_state
from loadtest.dataset import Recording
from loadtest.gpu.fidelity import __main__ as fidelity
from loadtest.gpu.fidelity.__main__ import Outcome, compare, goals
from loadtest.gpu.fidelity.counting import Mistake, System, count, error_rate, margin
from loadtest.gpu.fidelity.engine import Engine, forced_states
from loadtest.gpu.fidelity.reference import Reference, Right, Window
from serve_app.engine.checkpoint import Checkpoint, load
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.tokens import Tokens
from tests.engine.conftest import SAMPLE, read_pcm
from tests.loadtest.gpu_systems import SMALL

CPU = torch.device("cpu")
BEGIN = 10  # of timestamps, in a vocabulary of 14


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return load("embedded:tiny.en")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_pcm(SAMPLE)


def recording(file: str) -> Recording:
    return Recording(Path(file), file, 12.0, "en", "", "", "en_short", True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multilingual", [False, True])
def test_states_made_by_hand_are_those_that_decoding_leaves(multilingual: bool, seed: int) -> None:
    dims = SMALL if multilingual else replace(SMALL, n_vocab=51864)
    tokens = Tokens(dims)
    rules = rules_of(tokens.vocabulary, dims)
    choose = NextToken(rules, CPU, 1)
    start = tokens.start_sequence("en", "transcribe", timestamps=True)
    state = torch.tensor([new_state(start, position=5, timestamps=True, temperature=0.0, seed=0)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    before, chosen = [], []
    for _ in range(60):
        before.append(state[0].tolist())
        # so sure now and then that text wins over all timestamps together
        choose(torch.randn(1, dims.n_vocab, generator=generator) * (1 + 3 * (seed % 3)), state)
        chosen.append(int(state[0, Field.TOKEN]))
        if state[0, Field.FINISHED]:
            break
    sampled = chosen[len(start) - 1 :]
    made = forced_states(start, sampled, position=5, timestamp_begin=rules.timestamp_begin)
    measured = (Field.SUM_LOGPROB, Field.NO_SPEECH)  # no rule asks for them
    expected = [[0 if i in measured else value for i, value in enumerate(row)] for row in before]
    assert made == expected


def test_both_choose_openai_whispers_tokens_in_float32(tiny: Checkpoint, speech: np.ndarray) -> None:
    cut = [[speech[:64_000], speech[64_000:128_000]], [speech[100_000:180_000]]]
    outcome = compare(tiny, [recording("two"), recording("one")], cut, CPU, slots=2)
    assert outcome.texts == outcome.right_texts
    assert {file: len(texts) for file, texts in outcome.texts.items()} == {"two": 2, "one": 1}
    for system in (outcome.ours, outcome.theirs):
        assert system.windows == system.free == 3
        assert system.positions == system.forced > 20
        assert system.mistakes == []
        assert system.reached


def test_what_is_wrong_is_listed_with_the_margin_in_float32(tiny: Checkpoint, speech: np.ndarray) -> None:
    window = Window("sample#0", "sample", speech[:160_000], "en", None)
    right = Reference(tiny, CPU).right(window)
    engine = Engine(tiny, Compute.resolve("cpu", "float32"), slots=1)
    states = engine.encode([window])
    spoilt = states + 0.5 * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    [forced] = engine.forced([window], spoilt, [right.chosen])
    system = System("spoilt")
    count(system, window, right, forced, False, engine.tokens)
    assert 0 < system.forced < system.positions == len(right.chosen)
    assert len(system.mistakes) == system.positions - system.forced
    assert min(system.margins) > 0
    assert not system.reached
    # the mistakes leave no trace: the slot decodes the window as if nothing had been
    assert [result.tokens for result in engine.free([window], states)] == [right.chosen[:-1]]


def test_a_margin_between_tokens_of_one_kind_is_that_of_their_logits() -> None:
    logits = torch.tensor([1.0, 4.0, 3.5, *[0.0] * 11])
    assert margin(logits, 4.0, right=1, chosen=2, timestamp_begin=BEGIN) == pytest.approx(0.5)


def test_between_text_and_timestamp_it_is_what_the_rules_weigh() -> None:
    logits = torch.cat([torch.full((BEGIN,), -torch.inf), torch.zeros(4)])  # all timestamps together were likelier
    expected = np.log(4) - 1.2
    assert margin(logits, 1.2, right=12, chosen=3, timestamp_begin=BEGIN) == pytest.approx(expected)


def test_a_token_that_float32_forbids_has_no_margin() -> None:
    logits = torch.tensor([1.0, -torch.inf, *[0.0] * 12])
    assert margin(logits, 1.0, right=0, chosen=1, timestamp_begin=BEGIN) is None
    mistake = Mistake("a#0", 0, "x", "y", None)
    assert System("one", 1, 0, 1, 0, [mistake]).margins == []


@pytest.mark.parametrize(("forced", "free", "reached"), [(998, 97, True), (997, 100, False), (1000, 96, False)])
def test_both_goals_count(forced: int, free: int, reached: bool) -> None:
    assert System("ours", 1000, forced, 100, free).reached is reached


WORDS = 1000  # of a reference


def wrong(words: int) -> str:
    """The reference with so many words left out."""
    return " ".join(["word"] * (WORDS - words))


@pytest.mark.parametrize(
    ("forced", "theirs_forced", "wrong_words", "missed"),
    [
        (999, 999, 3, set()),
        (999, 1000, 0, {"no worse than openai-whisper's FP16"}),
        (997, 990, 0, {"forced at least 99.8 %, free at least 97 %"}),
        (999, 999, 4, {"word error rate within 0.3 points"}),
    ],
)
def test_every_goal_counts(forced: int, theirs_forced: int, wrong_words: int, missed: set[str]) -> None:
    made = [recording("a"), replace(recording("b"), scored=False)]
    made[0] = replace(made[0], text=wrong(0))
    texts = {"a": [wrong(10 + wrong_words), ""], "b": ["unscored"]}
    right_texts = {"a": [wrong(500), wrong(510)], "b": [""]}
    outcome = Outcome(
        System("ours", 1000, forced, 100, 98), System("theirs", 1000, theirs_forced, 100, 98), texts, right_texts
    )
    rates = error_rate(made, texts), error_rate(made, right_texts)
    assert (rates[0].words, rates[0].errors, rates[1].errors) == (WORDS, 10 + wrong_words, 10)
    assert {goal for goal, reached in goals(outcome, rates).items() if not reached} == missed


def test_the_verdict_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_audio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compared(checkpoint: Checkpoint, recordings: list[Recording], *_: object) -> Outcome:
        missed = System("ours", 1000, 990, 100, 97, [Mistake("a#0", 3, " one", "<|0.02|>", 0.01)])
        texts = {r.file: [r.text] for r in recordings}
        return Outcome(missed, System("theirs", 1000, 999, 100, 98), texts, texts)

    monkeypatch.setattr(fidelity, "compare", compared)
    out = tmp_path / "fidelity.json"
    options = ["--device", "cpu", "--model", "embedded:tiny.en", "--files", "1", "--json", str(out)]
    assert fidelity.main([*options, "--audio", str(shared_audio)]) == 1
    assert '"forced_share": 0.99' in out.read_text()
    printed = capsys.readouterr().out
    assert "'<|0.02|>' for ' one', margin 0.0100" in printed
    assert "missed" in printed


def test_right_tokens_come_with_the_end(tiny: Checkpoint, speech: np.ndarray) -> None:
    right: Right = Reference(tiny, CPU).right(Window("a", "a", speech[:64_000], "en", None))
    assert right.chosen[-1] == Tokens(tiny.dims).vocabulary.end
    assert right.logits.argmax(dim=1).tolist() == right.chosen
    assert right.logits.shape == (len(right.best_text), tiny.dims.n_vocab)
