from __future__ import annotations

import pytest
from whisper.tokenizer import LANGUAGES

from serve_app.api.languages import language_code, language_name


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_is_known_by_code_and_by_name_in_any_case(code: str) -> None:
    name = language_name(code)
    assert {language_code(n) for n in (code, code.upper(), name, name.title(), f" {name} ")} == {code}


@pytest.mark.parametrize(("alias", "code"), [("jv", "jw"), ("nb", "no"), ("castilian", "es"), ("Mandarin", "zh")])
def test_other_names_lead_to_whisper_s_code(alias: str, code: str) -> None:
    assert language_code(alias) == code


@pytest.mark.parametrize("name", ["", "xx", "klingon", "en-US", "<|en|>"])
def test_what_is_no_language_has_no_code(name: str) -> None:
    assert language_code(name) is None
