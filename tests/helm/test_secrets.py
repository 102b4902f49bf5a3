"""templates/secrets.yaml: what is secret is in secrets, and nowhere else."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import helm_python

from serve_app.api.auth import ApiKeys
from tests.helm.cases import CASES
from tests.helm.rendering import NOTES, at, chart, merged, named, objects, one, parsed, render

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


class Api(BaseHTTPRequestHandler):
    """As much of an API server as Helm's ``lookup`` asks for: what kinds there are, and one Secret."""

    secret: ClassVar[dict[str, Any]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        meta = self.secret["metadata"]
        kinds = [{"name": "secrets", "kind": "Secret", "namespaced": True, "singularName": "", "verbs": ["get"]}]
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": kinds},
            f"/api/v1/namespaces/{meta['namespace']}/secrets/{meta['name']}": self.secret,
        }
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(answers.get(path, missing)).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_what_is_random_stays_on_an_upgrade() -> None:
    values = at("faultTolerance.redis", "bundled")
    there = one(objects(values), "Secret", "-ray-token")
    there["metadata"]["namespace"] = "asr"
    Api.secret = there
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with helm_python.Config(
            kube_apiserver=f"http://127.0.0.1:{server.server_port}", namespace="asr", storage_driver="memory"
        ) as cluster:
            rendered = cluster.render(chart(), values, name="speech", namespace="asr", is_upgrade=True)
        server.shutdown()
    found = list(parsed(rendered))
    assert decoded(one(found, "Secret", "-ray-token"), "auth_token") == decoded(there, "auth_token")
    assert len(decoded(one(found, "Secret", "-redis"), "password")) == 48  # this one is not there yet


def test_secrets_that_exist_are_not_made() -> None:
    assert named(objects(CASES["existing-secrets"]), "Secret") == []
    nothing = objects(merged(at("rayAuth.enabled", False)))
    assert named(nothing, "Secret") == []
