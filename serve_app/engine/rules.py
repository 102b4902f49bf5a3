"""The rules of choosing tokens (``kernels.next_token``) for one model's vocabulary."""

from __future__ import annotations

from kernels.next_token import Rules
from serve_app.engine.checkpoint import Dims
from serve_app.engine.constants import MAX_INITIAL_TIMESTAMP
from serve_app.engine.tokens import Vocabulary


def rules_of(vocabulary: Vocabulary, dims: Dims, max_tokens: int | None = None) -> Rules:
    """max_tokens: of one window, where they are to be fewer than openai-whisper's half of the context."""
    most = dims.n_text_ctx // 2
    languages = sorted(vocabulary.languages.values())
    blank_first, blank_second = vocabulary.blank
    return Rules(
        n_vocab=dims.n_vocab,
        end=vocabulary.end,
        no_speech=vocabulary.no_speech,
        no_timestamps=vocabulary.no_timestamps,
        timestamp_begin=vocabulary.timestamp_begin,
        blank_first=blank_first,
        blank_second=blank_second,
        language_begin=languages[0] if languages else 0,
        language_end=languages[-1] + 1 if languages else 0,
        most_initial_timestamp=MAX_INITIAL_TIMESTAMP,
        most_sampled=most if max_tokens is None else min(most, max_tokens),
        n_ctx=dims.n_text_ctx,  # as in openai-whisper, one token past its end
        suppressed=vocabulary.suppressed,
    )
