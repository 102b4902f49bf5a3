from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens
from whisper.tokenizer import get_tokenizer

from kernels.next_token import DETECT, FIELDS, Field, NextToken, gumbel, idle_states, new_state
from serve_app.engine.checkpoint import Dims
from serve_app.engine.constants import MAX_INITIAL_TIMESTAMP
from serve_app.engine.rules import rules_of
from serve_app.engine.tokens import Tokens

DIMS = Dims(80, 1500, 8, 1, 1, 51865, 448, 8, 1, 1)
TOKENS = Tokens(DIMS)
VOCABULARY = TOKENS.vocabulary
CPU = torch.device("cpu")
CHOOSE = NextToken(rules_of(VOCABULARY, DIMS), CPU, 8)
REFERENCE = get_tokenizer(True, num_languages=99, language="en", task="transcribe")


def reference_choice(logits: torch.Tensor, history: list[int], *, timestamps: bool) -> tuple[int, float]:
    """openai-whisper's own filters and greedy choice after the tokens sampled so far."""
    start = [*REFERENCE.sot_sequence] if timestamps else [*REFERENCE.sot_sequence_including_notimestamps]
    filters = [SuppressBlank(REFERENCE, len(start)), SuppressTokens(VOCABULARY.suppressed)]
    if timestamps:
        filters.append(ApplyTimestampRules(REFERENCE, len(start), MAX_INITIAL_TIMESTAMP))
    logits = logits.clone()[None]
    for rule in filters:
        rule.apply(logits, torch.tensor([start + history]))
    token = int(logits.argmax())
    return token, float(logits.log_softmax(-1)[0, token])


def random_logits(generator: torch.Generator, timestamp_lead: float) -> torch.Tensor:
    """Random logits in which timestamps and the end are likely enough to occur."""
    logits = torch.randn(DIMS.n_vocab, generator=generator) * 3
    logits[VOCABULARY.timestamp_begin :] += timestamp_lead
    logits[VOCABULARY.end] += timestamp_lead + 8
    return logits


def states(*timestamps: bool, temperature: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Slots whose next token is the first that is sampled."""
    start = [VOCABULARY.start]
    rows = [new_state(start, position=0, timestamps=t, temperature=temperature, seed=seed) for t in timestamps]
    return torch.tensor(rows, dtype=torch.int32)


def floats(state: torch.Tensor, field: Field) -> torch.Tensor:
    return state.view(torch.float32)[:, field]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    timestamps=st.lists(st.booleans(), min_size=1, max_size=4),
    leads=st.lists(st.sampled_from([-3.0, 0.0, 3.0, 6.0]), min_size=8, max_size=8),
)
def test_every_slot_chooses_what_openai_whisper_would(seed: int, timestamps: list[bool], leads: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = states(*timestamps)
    histories: list[list[int]] = [[] for _ in timestamps]
    sums = [0.0] * len(timestamps)
    for step, lead in enumerate(leads, start=1):
        logits = torch.stack([random_logits(generator, lead) for _ in timestamps])
        going = [not finished for finished in state[:, Field.FINISHED].tolist()]
        CHOOSE(logits, state)
        for i, (history, timed) in enumerate(zip(histories, timestamps, strict=True)):
            if not going[i]:
                assert state[i, Field.SAMPLED] == len(history)
                continue
            token, logprob = reference_choice(logits[i], history, timestamps=timed)
            history.append(token)
            sums[i] += logprob
            assert state[i, Field.TOKEN] == token
            assert state[i, Field.POSITION] == state[i, Field.SAMPLED] == step
            assert state[i, Field.FINISHED] == int(token == VOCABULARY.end)
        torch.testing.assert_close(floats(state, Field.SUM_LOGPROB), torch.tensor(sums), rtol=0, atol=1e-3)


def test_the_start_sequence_is_taken_token_by_token_and_its_first_logits_tell_of_speech() -> None:
    start = TOKENS.start_sequence("de", "translate", timestamps=False)
    assert len(start) == 4
    state = torch.tensor([new_state(start, position=9, timestamps=False, temperature=0.0, seed=0)], dtype=torch.int32)
    logits = torch.zeros(1, DIMS.n_vocab)
    logits[0, VOCABULARY.no_speech] = 10.0
    for i in range(1, 4):
        CHOOSE(logits, state)
        assert state[0, Field.TOKEN] == start[i]
        assert state[0, Field.POSITION] == 9 + i
        assert state[0, Field.SAMPLED] == 0
    expected = logits.softmax(dim=-1)[0, VOCABULARY.no_speech]
    torch.testing.assert_close(floats(state, Field.NO_SPEECH)[0], expected)
    logits[0, 1000] = 20.0
    CHOOSE(logits, state)
    assert state[0, Field.TOKEN] == 1000
    assert state[0, Field.SAMPLED] == 1


def test_the_likeliest_language_is_detected_for_each_row() -> None:
    start = [VOCABULARY.start, DETECT, 50359]
    rows = [new_state(start, position=0, timestamps=True, temperature=0.0, seed=0) for _ in range(2)]
    state = torch.tensor(rows, dtype=torch.int32)
    logits = torch.zeros(2, DIMS.n_vocab)
    logits[0, VOCABULARY.languages["de"]] = 5.0
    logits[1, VOCABULARY.languages["ja"]] = 5.0
    logits[:, 1000] = 9.0  # not a language
    CHOOSE(logits, state)
    expected = [VOCABULARY.languages["de"], VOCABULARY.languages["ja"]]
    assert state[:, Field.TOKEN].tolist() == state[:, Field.START + 1].tolist() == expected


def test_idle_slots_stay_as_they_are() -> None:
    state = idle_states(3, CPU)
    before = state.clone()
    CHOOSE(torch.randn(3, DIMS.n_vocab), state)
    assert torch.equal(state, before)


def test_a_window_ends_at_half_the_context_and_at_its_end() -> None:
    logits = torch.zeros(1, DIMS.n_vocab)
    logits[0, 1000] = 5.0
    state = states(False)
    for _ in range(DIMS.n_text_ctx // 2):
        assert state[0, Field.FINISHED] == 0
        CHOOSE(logits, state)
    assert state[0, Field.FINISHED] == 1
    state = states(False)
    state[0, Field.POSITION] = DIMS.n_text_ctx - 1
    CHOOSE(logits, state)
    assert state[0, Field.FINISHED] == 1


def sample(seed: int) -> list[int]:
    state = states(False, temperature=1.0, seed=seed)
    chosen = []
    for step in range(10):
        CHOOSE(random_logits(torch.Generator().manual_seed(step), -3.0)[None], state)
        chosen.append(int(state[0, Field.TOKEN]))
    return chosen


def test_sampling_repeats_with_its_seed_and_varies_with_another() -> None:
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_samples_follow_the_distribution() -> None:
    logits = torch.full((1, DIMS.n_vocab), -50.0)
    logits[0, 1000], logits[0, 2000] = 0.0, torch.tensor(3.0).log()  # 1 : 3
    draws = []
    for seed in range(1000):
        state = states(False, temperature=1.0, seed=seed)
        CHOOSE(logits, state)
        draws.append(int(state[0, Field.TOKEN]))
    assert set(draws) == {1000, 2000}
    assert 0.70 < draws.count(2000) / 1000 < 0.80


def test_gumbel_numbers_have_their_mean_and_spread() -> None:
    numbers = torch.stack([gumbel(seed, sampled, torch.arange(5000)) for seed in range(4) for sampled in range(4)])
    assert float(numbers.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(numbers.var()) == pytest.approx(1.6449, abs=0.06)


def test_a_start_sequence_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4 tokens, not 5"):
        new_state([1] * 5, position=0, timestamps=True, temperature=0.0, seed=0)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="logits must be"):
        CHOOSE(torch.zeros(1, 10), states(True))
    with pytest.raises(ValueError, match="states must be"):
        CHOOSE(torch.zeros(1, DIMS.n_vocab), torch.zeros(2, FIELDS, dtype=torch.int32))
