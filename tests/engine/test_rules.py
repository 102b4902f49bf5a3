from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.decoding import ApplyTimestampRules, SuppressBlank, SuppressTokens
from whisper.tokenizer import get_tokenizer

from serve_app.engine.checkpoint import Dims
from serve_app.engine.constants import MAX_INITIAL_TIMESTAMP
from serve_app.engine.rules import Rules, RuleState
from serve_app.engine.tokens import Tokens

DIMS = Dims(80, 1500, 8, 1, 1, 51865, 448, 8, 1, 1)
TOKENS = Tokens(DIMS)
VOCABULARY = TOKENS.vocabulary
CPU = torch.device("cpu")
RULES = Rules(VOCABULARY, DIMS.n_vocab, CPU)
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


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    timestamps=st.lists(st.booleans(), min_size=1, max_size=4),
    leads=st.lists(st.sampled_from([-3.0, 0.0, 3.0, 6.0]), min_size=8, max_size=8),
)
def test_every_slot_chooses_what_openai_whisper_would(seed: int, timestamps: list[bool], leads: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = len(timestamps)
    state = RuleState(n, CPU)
    for slot, timed in enumerate(timestamps):
        state.start(slot, timestamps=timed, temperature=0.0)
    histories: list[list[int]] = [[] for _ in range(n)]
    for lead in leads:
        logits = torch.stack([random_logits(generator, lead) for _ in range(n)])
        expected = [
            reference_choice(row, history, timestamps=timed)
            for row, history, timed in zip(logits, histories, timestamps, strict=True)
        ]
        tokens, logprobs = RULES.choose(logits, state, slice(0, n), [None] * n)
        assert tokens.tolist() == [token for token, _ in expected]
        torch.testing.assert_close(logprobs, torch.tensor([p for _, p in expected]), rtol=0, atol=1e-4)
        for history, token in zip(histories, tokens.tolist(), strict=True):
            history.append(token)


def test_a_moved_slot_keeps_its_rules() -> None:
    state = RuleState(3, CPU)
    state.start(0, timestamps=True, temperature=0.0)
    state.start(2, timestamps=True, temperature=0.0)
    first = random_logits(torch.Generator().manual_seed(1), 0.0)[None]
    RULES.choose(first.clone(), state, slice(2, 3), [None])
    state.move(2, 0)
    later = random_logits(torch.Generator().manual_seed(2), 3.0)[None]
    moved, _ = RULES.choose(later.clone(), state, slice(0, 1), [None])
    stayed, _ = RULES.choose(later.clone(), state, slice(2, 3), [None])
    assert moved.tolist() == stayed.tolist()


def test_sampling_repeats_with_its_seed_and_varies_with_another() -> None:
    def sample(seed: int) -> list[int]:
        state = RuleState(1, CPU)
        state.start(0, timestamps=False, temperature=1.0)
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for step in range(10):
            logits = random_logits(torch.Generator().manual_seed(step), -3.0)[None]
            chosen += RULES.choose(logits, state, slice(0, 1), [generator])[0].tolist()
        return chosen

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_samples_follow_the_distribution() -> None:
    logits = torch.full((1, DIMS.n_vocab), -50.0)
    logits[0, 1000], logits[0, 2000] = 0.0, torch.tensor(3.0).log()  # 1 : 3
    state = RuleState(1, CPU)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(1000):
        state.start(0, timestamps=False, temperature=1.0)
        draws += RULES.choose(logits.clone(), state, slice(0, 1), [generator])[0].tolist()
    assert set(draws) == {1000, 2000}
    assert 0.70 < draws.count(2000) / 1000 < 0.80


def test_the_likeliest_language_is_detected_for_each_row() -> None:
    logits = torch.zeros(2, DIMS.n_vocab)
    logits[0, VOCABULARY.languages["de"]] = 5.0
    logits[1, VOCABULARY.languages["ja"]] = 5.0
    logits[:, 1000] = 9.0  # not a language
    assert RULES.detect_language(logits) == ["de", "ja"]
