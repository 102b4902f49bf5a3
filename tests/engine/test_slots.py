from __future__ import annotations

import numpy as np
import pytest
import torch
from whisper.decoding import DecodingOptions, DecodingResult, decode
from whisper.model import Whisper

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.encoder import Encoder
from serve_app.engine.fallback import DecodedWindow, quality
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens

FLOAT32 = Compute.resolve("cpu", "float32")


def pieces(speech: np.ndarray, count: int) -> list[np.ndarray]:
    """Windows of different lengths and contents from one recording."""
    rng = np.random.default_rng(7)
    starts = rng.integers(0, len(speech) // 2, count)
    lengths = rng.integers(24_000, 160_000, count)
    return [speech[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def drain(decoder: SlotDecoder) -> dict[str, DecodedWindow]:
    done: dict[str, DecodedWindow] = {}
    while decoder.active:
        done.update(decoder.step())
    return done


@pytest.fixture(scope="module")
def tiny_states(tiny: Checkpoint, speech: np.ndarray) -> torch.Tensor:
    return Encoder(tiny, FLOAT32)(LogMel(80, FLOAT32)(pieces(speech, 8)))


@pytest.fixture(scope="module")
def tiny_expected(reference_tiny: Whisper, tiny_states: torch.Tensor) -> list[DecodingResult]:
    with torch.no_grad():
        return [
            decode(reference_tiny, state.clone(), DecodingOptions(fp16=False, language="en")) for state in tiny_states
        ]


def test_encoder_state_equals_openai_whisper(tiny: Checkpoint, reference_tiny: Whisper, speech: np.ndarray) -> None:
    mel = LogMel(80, FLOAT32)([speech])
    with torch.no_grad():
        expected = reference_tiny.encoder(mel.clone())
    torch.testing.assert_close(Encoder(tiny, FLOAT32)(mel), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 8])
def test_tokens_equal_openai_whisper_in_batches(
    slots: int, tiny: Checkpoint, tiny_states: torch.Tensor, tiny_expected: list[DecodingResult]
) -> None:
    decoder = SlotDecoder(tiny, FLOAT32, slots)
    done: dict[str, DecodedWindow] = {}
    for first in range(0, len(tiny_states), slots):
        batch = enumerate(tiny_states[first : first + slots], start=first)
        decoder.admit([SlotTask(str(i), state, DecodeOptions(language="en")) for i, state in batch])
        done |= drain(decoder)
    for i, expected in enumerate(tiny_expected):
        assert done[str(i)].tokens == expected.tokens
        assert done[str(i)].avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
        assert done[str(i)].no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [3]], ids=["gaps are closed", "gaps stay, for a step costs the same"])
@pytest.mark.parametrize(("lag", "steps"), [(0, 1), (1, 1), (2, 1), (0, 3), (2, 4)])
def test_windows_entering_and_leaving_in_flight_do_not_change_each_other(
    lag: int,
    steps: int,
    sizes: list[int],
    tiny: Checkpoint,
    tiny_states: torch.Tensor,
    tiny_expected: list[DecodingResult],
) -> None:
    decoder = SlotDecoder(tiny, FLOAT32, 3, steps=steps)
    decoder._sizes, decoder.lag = sizes, lag  # as on a GPU: a graph for several sizes, read some steps late
    gaps = False
    waiting = list(enumerate(tiny_states))
    done: dict[str, DecodedWindow] = {}
    while waiting or decoder.active:
        if waiting and decoder.free:  # one at a time, so that starts are staggered
            i, state = waiting.pop(0)
            decoder.admit([SlotTask(str(i), state, DecodeOptions(language="en"))])
        for _ in range(3):
            done.update(decoder.step())
            gaps |= decoder._rows[0] is None and decoder.active > 0
    assert gaps or len(sizes) > 1
    done.update(decoder.read())
    assert [done[str(i)].tokens for i in range(len(tiny_states))] == [e.tokens for e in tiny_expected]


def test_a_cancelled_window_frees_its_slot_and_leaves_the_others_alone(
    tiny: Checkpoint, tiny_states: torch.Tensor, tiny_expected: list[DecodingResult]
) -> None:
    decoder = SlotDecoder(tiny, FLOAT32, 3)
    decoder.admit([SlotTask(str(i), tiny_states[i], DecodeOptions(language="en")) for i in range(3)])
    decoder.step()
    decoder.cancel({"0", "unknown"})
    assert decoder.free == 1
    done = drain(decoder)
    assert {i: r.tokens for i, r in done.items()} == {str(i): tiny_expected[i].tokens for i in (1, 2)}


@pytest.mark.parametrize("max_tokens", [1, 7, 1000])
def test_a_window_ends_at_the_most_tokens_it_may_have(
    max_tokens: int, tiny: Checkpoint, tiny_states: torch.Tensor, tiny_expected: list[DecodingResult]
) -> None:
    rules = rules_of(Tokens(tiny.dims).vocabulary, tiny.dims, max_tokens)
    decoder = SlotDecoder(tiny, FLOAT32, 1, rules)
    decoder.admit([SlotTask("a", tiny_states[0], DecodeOptions(language="en"))])
    assert drain(decoder)["a"].tokens == tiny_expected[0].tokens[:max_tokens]


def test_a_window_that_changes_its_slot_keeps_its_prompt(tiny: Checkpoint, tiny_states: torch.Tensor) -> None:
    prompted = SlotTask("b", tiny_states[1], DecodeOptions(language="en", prompt="The quick brown fox. " * 5))
    alone = SlotDecoder(tiny, FLOAT32, 1)
    alone.admit([prompted])
    expected = drain(alone)["b"]
    decoder = SlotDecoder(tiny, FLOAT32, 2)
    decoder.admit([SlotTask("a", tiny_states[0], DecodeOptions(language="en")), prompted])
    decoder.cancel({"a"})  # before its first step: the second takes the first's slot
    moved = drain(decoder)["b"]
    assert moved.tokens == expected.tokens
    assert moved.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-4)


@pytest.mark.parametrize("coming", [0, 1, 2])
def test_free_rows_are_kept_for_windows_that_come(
    coming: int, tiny: Checkpoint, tiny_states: torch.Tensor, tiny_expected: list[DecodingResult]
) -> None:
    tasks = [SlotTask(str(i), tiny_states[i], DecodeOptions(language="en")) for i in range(3)]
    decoder = SlotDecoder(tiny, FLOAT32, 3)
    decoder.admit(tasks)
    decoder.cancel({"0"})
    done = dict(decoder.step(coming))
    kept, moved = [False, True, True], [True, True, False]
    assert [slot is not None for slot in decoder._rows] == (kept if coming else moved)
    decoder.admit(tasks[:1])
    done |= drain(decoder)
    assert [done[str(i)].tokens for i in range(3)] == [e.tokens for e in tiny_expected[:3]]


def test_more_windows_than_slots_are_refused(tiny: Checkpoint, tiny_states: torch.Tensor) -> None:
    decoder = SlotDecoder(tiny, FLOAT32, 1)
    with pytest.raises(ValueError, match="2 windows for 1 free slots"):
        decoder.admit([SlotTask(str(i), tiny_states[i], DecodeOptions()) for i in range(2)])


@pytest.mark.parametrize("prompt", ["", "The quick brown fox. " * 200])
@pytest.mark.parametrize("timestamps", [True, False])
def test_prompt_and_timestamp_mode_equal_openai_whisper(
    prompt: str, timestamps: bool, tiny: Checkpoint, reference_tiny: Whisper, tiny_states: torch.Tensor
) -> None:
    state = tiny_states[0]
    options = DecodingOptions(fp16=False, language="en", prompt=prompt or None, without_timestamps=not timestamps)
    with torch.no_grad():
        expected = decode(reference_tiny, state.clone(), options)
    decoder = SlotDecoder(tiny, FLOAT32, 2)
    decoder.admit([SlotTask("a", state, DecodeOptions(language="en", prompt=prompt, timestamps=timestamps))])
    assert drain(decoder)["a"].tokens == expected.tokens


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_multilingual_models_detect_the_language(
    task: str, base: Checkpoint, reference_base: Whisper, speech: np.ndarray
) -> None:
    state = Encoder(base, FLOAT32)(LogMel(80, FLOAT32)([speech]))
    with torch.no_grad():
        expected = decode(reference_base, state.clone(), DecodingOptions(fp16=False, task=task))[0]
    decoder = SlotDecoder(base, FLOAT32, 2)
    decoder.admit([SlotTask("a", state[0], DecodeOptions(task=task, prompt="Hello."))])
    with_prompt = drain(decoder)["a"]
    decoder.admit([SlotTask("a", state[0], DecodeOptions(task=task))])
    result = drain(decoder)["a"]
    assert result.language == with_prompt.language == expected.language == "en"
    assert result.tokens == expected.tokens


def test_of_a_window_that_fails_the_checks_at_every_temperature_the_best_attempt_is_kept(
    tiny: Checkpoint, tiny_states: torch.Tensor
) -> None:
    # noise where the encoder state should be: the model is unsure whatever it writes
    nonsense = torch.randn(tiny_states[0].shape, generator=torch.Generator().manual_seed(3)) * 3

    def attempt(seed: int, *temperatures: float) -> DecodedWindow:
        decoder = SlotDecoder(tiny, FLOAT32, 2)
        options = DecodeOptions(language="en", temperatures=temperatures, seed=seed)
        good = SlotTask("good", tiny_states[0], DecodeOptions(language="en"))
        decoder.admit([SlotTask("bad", nonsense, options), good])
        done = drain(decoder)
        assert done["good"].temperature == 0.0
        return done["bad"]

    cold, hot = attempt(11, 0.0), attempt(12, 0.5)
    assert not cold.is_acceptable
    assert cold.tokens != hot.tokens
    expected = hot if hot.is_acceptable else max([cold, hot], key=quality)
    assert attempt(11, 0.0, 0.5).tokens == expected.tokens  # the second attempt's seed is the next one
