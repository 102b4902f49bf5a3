"""templates/secrets.yaml: what is secret is in secrets, and nowhere else."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from serve_app.api.auth import ApiKeys
from tests.helm.cases import CASES
from tests.helm.rendering import NOTES, at, merged, named, objects, one, render

KEYS = ["sk-0123456789abcdef", "sk-fedcba9876543210"]


def decoded(secret: dict[str, dict[str, str]], entry: str) -> str:
    return base64.b64decode(secret["data"][entry]).decode()


def test_keys_are_a_file_that_the_api_reads(tmp_path: Path) -> None:
    secret = one(objects(at("apiKeys.keys", KEYS)), "Secret", "-api-keys")
    file = tmp_path / "keys"
    file.write_text(decoded(secret, "keys"))
    known = ApiKeys([], file)
    for key in KEYS:
        known.check(key)


def test_keys_are_in_their_secret_alone() -> None:
    rendered = render(at("apiKeys.keys", KEYS))
    assert NOTES in rendered
    for key in KEYS:
        for form in (key, base64.b64encode(key.encode()).decode()):
            assert not [path for path, text in rendered.items() if form in text]


def test_passwords_are_in_their_secrets_alone() -> None:
    found = objects(CASES["production"])
    hidden = {
        (value, base64.b64decode(value).decode())
        for secret in named(found, "Secret")
        for value in secret["data"].values()
    }
    assert len(hidden) == 2
    others = json.dumps([each for each in found if each["kind"] != "Secret"])
    for encoded, plain in hidden:
        assert len(plain) == 48
        assert plain not in others
        assert encoded not in others


def test_each_install_has_its_own() -> None:
    first, second = (decoded(one(objects(), "Secret", "-ray-token"), "auth_token") for _ in range(2))
    assert first != second


def test_secrets_that_exist_are_not_made() -> None:
    assert named(objects(CASES["existing-secrets"]), "Secret") == []
    nothing = objects(merged(at("rayAuth.enabled", False)))
    assert named(nothing, "Secret") == []
