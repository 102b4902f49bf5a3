from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serve_app.api.auth import ApiKeys
from serve_app.api.routes import build_api
from serve_app.errors import AuthenticationFailed
from serve_app.settings import HttpSettings, Settings
from tests.api.conftest import Running, Serve, running
from tests.api.service import FixedService


def accepts(keys: ApiKeys, key: str | None) -> bool:
    try:
        keys.check(key)
    except AuthenticationFailed:
        return False
    return True


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.fixture(scope="module")
def keyed_server() -> Iterator[Running]:
    with running(FixedService(), Settings(http=HttpSettings(api_keys=["alpha", "beta", "schlüssel"]))) as server:
        yield server


@pytest.fixture
def keyed(keyed_server: Running) -> Running:
    keyed_server.service.asked.clear()
    return keyed_server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# team a\nalpha\n\n  beta  \n")
    return path


def test_openai_s_client_needs_a_key_where_keys_are_set(keyed: Running) -> None:
    assert [model.id for model in keyed.openai("beta").models.list()] == ["base", "whisper-1"]
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as caught:
        keyed.openai("gamma").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "gamma" not in caught.value.message


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Basic alpha"}, {"Authorization": "Bearer"}, {"api-key": "alpha"}]
)
def test_without_a_key_every_route_of_the_api_is_closed(keyed: Running, headers: dict[str, str]) -> None:
    for response in (
        keyed.get("/v1/models", headers),
        keyed.get("/v1/models/base", headers),
        keyed.post(headers=headers),
        keyed.post("/v1/audio/translations", headers=headers),
    ):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "didn't provide an API key" in response.json()["error"]["message"]
    assert not keyed.service.asked


def test_a_stranger_s_upload_is_refused_whatever_it_holds(keyed: Running) -> None:
    assert keyed.post(data={"model": "nonsense"}, headers={"X-Priority": "nonsense"}).status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/docs", "/openapi.json"])
def test_health_and_documentation_need_no_key(keyed: Running, path: str) -> None:
    assert keyed.get(path).status_code == 200


def test_without_keys_the_server_is_open() -> None:
    assert ApiKeys.from_settings(HttpSettings()) is None


def test_a_file_holds_a_key_a_line(file: Path) -> None:
    keys = ApiKeys(["gamma"], file)
    assert all(accepts(keys, key) for key in ("alpha", "beta", "gamma"))
    assert not any(accepts(keys, key) for key in ("", None, "# team a", "  beta  ", "alph", "alphaa", "ALPHA"))


def test_keys_may_hold_any_letter(keyed: Running) -> None:
    headers = {"Authorization": "Bearer schlüssel".encode()}
    assert keyed.get("/v1/models", headers).status_code == 200  # type: ignore[arg-type]


def test_keys_rotate_while_the_server_runs(serve: Serve, file: Path) -> None:
    api = serve(http={"api_keys_file": file})
    api.openai("alpha").models.list()
    replace(file, "delta\n")
    api.openai("delta").models.list()
    with pytest.raises(openai.AuthenticationError):
        api.openai("alpha").models.list()


@pytest.mark.parametrize("broken", ["", "# none\n", "two words\n", None])
def test_no_key_of_a_broken_file_counts_until_it_is_mended(
    file: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(["gamma"], file)
    if broken is None:
        file.unlink()
    else:
        replace(file, broken)
    assert not accepts(keys, "alpha")
    assert accepts(keys, "gamma")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    replace(file, "alpha\n")
    assert accepts(keys, "alpha")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"# none\n\n", "holds no key"),
        (b"alpha\nbeta # team b\n", "line 2"),
        (b"\xff", "cannot be"),
    ],
)
def test_the_server_does_not_start_on_a_broken_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_api(FixedService(), Settings(http=HttpSettings(api_keys_file=path)))


def test_the_server_does_not_start_with_a_blank_key() -> None:
    with pytest.raises(ValueError, match="blank"):
        build_api(FixedService(), Settings(http=HttpSettings(api_keys=["alpha", " "])))
