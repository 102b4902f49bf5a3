from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.next_token import Field, NextToken, new_state
from loadtest.dataset import Recording
from loadtest.gpu import fidelity
from loadtest.gpu.fidelity import (
    Engine,
    Mistake,
    Reference,
    Right,
    System,
    Window,
    compare,
    count,
    forced_states,
    margin,
)
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
    ours, theirs = compare(tiny, [recording("two"), recording("one")], cut, CPU, slots=2)
    for system in (ours, theirs):
        assert system.windows == system.free == 3
        assert system.positions == system.forced > 20
        assert system.mistakes == []
        assert system.reached


def test_what_is_wrong_is_listed_with_the_margin_in_float32(tiny: Checkpoint, speech: np.ndarray) -> None:
    window = Window("sample#0", speech[:160_000], "en", None)
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
    assert engine.free([window], states) == [right.chosen[:-1]]


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


def test_the_verdict_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_audio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = System("ours", 1000, 990, 100, 97, [Mistake("a#0", 3, " one", "<|0.02|>", 0.01)])
    monkeypatch.setattr(fidelity, "compare", lambda *_: [missed, System("theirs", 1000, 999, 100, 98)])
    out = tmp_path / "fidelity.json"
    options = ["--device", "cpu", "--model", "embedded:tiny.en", "--files", "1", "--json", str(out)]
    assert fidelity.main([*options, "--audio", str(shared_audio)]) == 1
    assert '"forced_share": 0.99' in out.read_text()
    printed = capsys.readouterr().out
    assert "'<|0.02|>' for ' one', margin 0.0100" in printed
    assert "missed" in printed


def test_right_tokens_come_with_the_end(tiny: Checkpoint, speech: np.ndarray) -> None:
    right: Right = Reference(tiny, CPU).right(Window("a", speech[:64_000], "en", None))
    assert right.chosen[-1] == Tokens(tiny.dims).vocabulary.end
    assert right.logits.argmax(dim=1).tolist() == right.chosen
    assert right.logits.shape == (len(right.best_text), tiny.dims.n_vocab)
