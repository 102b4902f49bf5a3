from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.checkpoint import Dims
from serve_app.engine.fallback import DecodedWindow
from serve_app.engine.tokens import Tokens
from serve_app.engine.transcript import assemble, window_segments

TOKENS = Tokens(Dims(80, 1500, 8, 1, 1, 51865, 448, 8, 1, 1))
BEGIN = TOKENS.vocabulary.timestamp_begin
HELLO = TOKENS._plain.encode(" Hello")
WORLD = TOKENS._plain.encode(" world.")


def at(seconds: float) -> int:
    return BEGIN + round(seconds / 0.02)


def decoded(tokens: list[int]) -> DecodedWindow:
    return DecodedWindow(tokens, TOKENS.text(tokens).strip(), "en", 0.0, -0.2, 0.01)


def segments(tokens: list[int], start: float = 0.0, seconds: float = 30.0) -> list[tuple[float, float, str]]:
    found = window_segments(decoded(tokens), TOKENS, start=start, seconds=seconds)
    return [(round(s.start, 2), round(s.end, 2), s.text) for s in found]


def test_pairs_of_timestamps_separate_segments() -> None:
    tokens = [at(0), *HELLO, at(2.5), at(3.0), *WORLD, at(4.0)]
    assert segments(tokens) == [(0.0, 2.5, " Hello"), (3.0, 4.0, " world.")]


def test_times_are_those_of_the_recording() -> None:
    assert segments([at(1), *HELLO, at(2)], start=100.0) == [(101.0, 102.0, " Hello")]


def test_text_without_a_closing_timestamp_lasts_to_the_windows_end() -> None:
    tokens = [at(0), *HELLO, at(2.5), at(2.5), *WORLD]
    assert segments(tokens, seconds=10.0) == [(0.0, 2.5, " Hello"), (2.5, 10.0, " world.")]


def test_text_without_timestamps_is_one_segment() -> None:
    assert segments([*HELLO, *WORLD], seconds=5.0) == [(0.0, 5.0, " Hello world.")]


def test_a_timestamp_past_the_windows_sound_is_cut_to_its_end() -> None:
    assert segments([at(0), *HELLO, at(29)], seconds=4.0) == [(0.0, 4.0, " Hello")]


def test_a_window_without_text_has_no_segments() -> None:
    assert segments([]) == segments([at(0), at(0)]) == []


@given(
    st.lists(st.tuples(st.floats(0, 30), st.sampled_from([HELLO, WORLD])), max_size=10),
    st.floats(0.1, 30),
    st.floats(0, 10_000),
)
def test_segments_stay_in_their_window_in_order_and_keep_all_text(
    pieces: list[tuple[float, list[int]]], seconds: float, start: float
) -> None:
    times = sorted(time for time, _ in pieces)
    tokens: list[int] = []
    for time, (_, text) in zip(times, pieces, strict=True):
        tokens += [at(time), *text, at(time)]
    found = window_segments(decoded(tokens), TOKENS, start=start, seconds=seconds)
    assert all(start <= s.start <= s.end <= start + seconds + 1e-6 for s in found)
    assert [s.start for s in found] == sorted(s.start for s in found)
    assert "".join(s.text for s in found) == TOKENS.text(tokens)


def test_windows_are_joined_and_their_segments_numbered() -> None:
    first = window_segments(decoded([at(0), *HELLO, at(2)]), TOKENS, start=0.0, seconds=30.0)
    second = window_segments(decoded([at(0), *WORLD, at(2)]), TOKENS, start=30.0, seconds=10.0)
    transcript = assemble([first, [], second], task="transcribe", language="en", duration=40.0)
    assert transcript.text == "Hello world."
    assert [(s.id, s.seek) for s in transcript.segments] == [(0, 0), (1, 3000)]
