from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.checkpoint import Dims
from serve_app.engine.tokens import Tokens

MODELS = {
    "multilingual": Tokens(Dims(80, 1500, 8, 1, 1, 51865, 448, 8, 1, 1)),
    "English": Tokens(Dims(80, 1500, 8, 1, 1, 51864, 448, 8, 1, 1)),
}


@pytest.mark.parametrize("model", MODELS)
@given(data=st.data())
def test_text_is_what_openai_whisper_says(model: str, data: st.DataObject) -> None:
    """Of any tokens, also of pieces of characters that make none, but without special ones and timestamps."""
    tokens = MODELS[model]
    chosen = data.draw(st.lists(st.integers(0, tokens.vocabulary.timestamp_begin + 1500)))
    plain = [token for token in chosen if token < tokens.vocabulary.end]
    assert tokens.text(chosen) == tokens._plain.decode(plain)
