"""The token sequences around a transcript, and the vocabulary's special places (openai-whisper's tokenizer)."""

from __future__ import annotations

from dataclasses import dataclass

from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer

from serve_app.engine.checkpoint import Dims


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Special tokens of one model. suppressed: never chosen; blank: not chosen first (a space and the end)."""

    end: int
    start: int
    previous: int
    no_timestamps: int
    no_speech: int
    timestamp_begin: int
    suppressed: tuple[int, ...]
    blank: tuple[int, ...]
    languages: dict[str, int]


class Tokens:
    """Text ↔ tokens for one model."""

    def __init__(self, dims: Dims):
        self.multilingual = dims.multilingual
        self.n_text_ctx = dims.n_text_ctx
        self._num_languages = dims.num_languages
        self._plain = self._tokenizer(None, "transcribe")
        self.vocabulary = self._vocabulary()
        self._bytes = [self._plain.encoding.decode_single_token_bytes(t) for t in range(self.vocabulary.end)]

    def _tokenizer(self, language: str | None, task: str) -> Tokenizer:
        return get_tokenizer(self.multilingual, num_languages=self._num_languages, language=language, task=task)

    def _vocabulary(self) -> Vocabulary:
        t = self._plain
        special = {t.transcribe, t.translate, t.sot, t.sot_prev, t.sot_lm, t.no_speech}
        return Vocabulary(
            end=t.eot,
            start=t.sot,
            previous=t.sot_prev,
            no_timestamps=t.no_timestamps,
            no_speech=t.no_speech,
            timestamp_begin=t.timestamp_begin,
            suppressed=tuple(sorted(special | set(t.non_speech_tokens))),
            blank=(*t.encode(" "), t.eot),
            languages=dict(zip(t.all_language_codes, t.all_language_tokens, strict=True)) if self.multilingual else {},
        )

    def start_sequence(self, language: str, task: str, *, timestamps: bool) -> tuple[int, ...]:
        """<|startoftranscript|>, and for multilingual models the language's and the task's token."""
        sequence = tuple(self._tokenizer(language, task).sot_sequence)
        return sequence if timestamps else (*sequence, self.vocabulary.no_timestamps)

    def prompt(self, text: str | None) -> tuple[int, ...]:
        """<|startofprev|> and the end of the text that precedes a window: at most half the decoder's context."""
        if text is None or not text.strip():
            return ()
        tokens = self._plain.encode(" " + text.strip(), disallowed_special=())
        return (self.vocabulary.previous, *tokens[-(self.n_text_ctx // 2 - 1) :])

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, without special tokens and timestamps.

        NOTES: not by tiktoken, which gives the interpreter to another thread meanwhile: the engine's, with a window to
        end, gets it back late where that is busy, and the GPU waits."""
        end = self.vocabulary.end
        return b"".join([self._bytes[t] for t in tokens if t < end]).decode(errors="replace")


def language_name(code: str) -> str:
    """``"en"`` → ``"english"``."""
    return str(LANGUAGES[code])
