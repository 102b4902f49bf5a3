"""Languages by every name a caller may use (openai-whisper's tables)."""

from __future__ import annotations

from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

# ISO 639-1 codes that Whisper's tokens spell otherwise: Javanese, and Bokmål, which Whisper calls Norwegian.
ISO_639_1_ALIASES = {"jv": "jw", "nb": "no"}


def language_code(name: str) -> str | None:
    """Whisper's code for an ISO 639-1 code, a Whisper code or an English name, in any case; None if there is none."""
    name = name.strip().lower()
    if name in LANGUAGES:
        return name
    return ISO_639_1_ALIASES.get(name) or TO_LANGUAGE_CODE.get(name)


def language_name(code: str) -> str:
    """The English name in lower case, as OpenAI's verbose JSON has it: ``"en"`` → ``"english"``."""
    name: str = LANGUAGES[code]
    return name
