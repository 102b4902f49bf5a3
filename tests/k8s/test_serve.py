from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k8s import serve
from k8s.serve import Deployment, ServeApi, ServeError
from tests.conftest import free_port
from tests.k8s.answering import Answering


def details(**deployments: Any) -> dict[str, Any]:
    return {"applications": {"whisper": {"external_scaler_enabled": True, "deployments": deployments}}}


def deployment(target: int, *states: str) -> dict[str, Any]:
    replicas = [{"replica_id": f"r{i}", "state": state, "node_id": None} for i, state in enumerate(states)]
    return {"target_num_replicas": target, "replicas": replicas}


def api(answer: Answering, token: Path | None = None) -> ServeApi:
    return ServeApi(url=answer.url, application="whisper", token_file=token)


def test_replicas_that_run_are_told_from_those_that_start_or_stop(answer: Answering) -> None:
    answer.json(details(encoder=deployment(3, "RUNNING", "STARTING", "STOPPING", "RUNNING")))
    status = api(answer).status(("encoder",))
    assert status.external
    assert status.deployments == {"encoder": Deployment(3, ("r0", "r3"))}
    assert status.running("encoder") == ("r0", "r3")
    assert status.running("decoder") == ()


def test_what_is_asked_for(answer: Answering) -> None:
    answer.json({"message": "Scaling request received."})
    api(answer).scale("encoder", 4)
    method, path, headers, body = answer.asked[0]
    assert (method, path) == ("POST", "/api/v1/applications/whisper/deployments/encoder/scale")
    assert json.loads(body) == {"target_num_replicas": 4}
    assert "Authorization" not in headers


def test_the_token_is_the_files_now(answer: Answering, tmp_path: Path) -> None:
    answer.json(details())
    token = tmp_path / "token"
    served = api(answer, token)
    for text in ("one\n", "two"):
        token.write_text(text)
        served.status(())
    assert [headers["Authorization"] for _, _, headers, _ in answer.asked] == ["Bearer one", "Bearer two"]
    token.unlink()
    with pytest.raises(serve.Unauthorized, match="cannot be read"):
        served.status(())


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, "Unauthorized: Missing authentication token", serve.Unauthorized, "wants another token"),
        (403, "Forbidden: Invalid authentication token", serve.Unauthorized, "wants another token"),
        (404, '{"error": "Application or Deployment not found"}', serve.NoApplication, "not found"),
        (412, '{"error": "Deployment is deleted"}', serve.NoApplication, "deleted"),
        (412, '{"error": "external_scaler_enabled=false"}', serve.ScalingOff, "external_scaler_enabled: true"),
        (500, "Internal Server Error", serve.Unreachable, "answers 500"),
        (503, '{"error": "Serve controller is not available"}', serve.Unreachable, "not available"),
        (400, '{"error": "Invalid request body"}', serve.BadAnswer, "answers 400"),
        (302, "", serve.BadAnswer, "answers 302"),
    ],
)
def test_a_refusal_is_told_by_its_kind(
    answer: Answering, status: int, body: str, kind: type[ServeError], words: str
) -> None:
    answer.status, answer.body = status, body.encode()
    with pytest.raises(kind, match=words):
        api(answer).scale("encoder", 2)
    with pytest.raises(kind, match=words):
        api(answer).status(())


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"applications": {"whisper": {"deployments": {"encoder": {}}}}}']
)
def test_what_is_not_serve_is_told(answer: Answering, body: bytes) -> None:
    answer.body = body
    with pytest.raises(serve.BadAnswer, match="does not answer like Ray Serve"):
        api(answer).status(())


def test_an_application_that_is_not_there_yet(answer: Answering) -> None:
    answer.json({"applications": {}})
    with pytest.raises(serve.NoApplication, match="no application whisper"):
        api(answer).status(())
    answer.json(details(encoder=deployment(1)))
    with pytest.raises(serve.NoApplication, match="no decoder, api"):
        api(answer).status(("encoder", "decoder", "api"))


def test_a_dashboard_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(serve.Unreachable, match="does not answer"):
        ServeApi(url=url, application="whisper", token_file=None).status(())
