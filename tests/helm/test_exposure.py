"""templates/service.yaml, ingress.yaml, httproute.yaml and NOTES.txt: how clients come in."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.cases import CASES, CONTROLLER, INGRESS, ROUTE
from tests.helm.rendering import NOTES, at, merged, named, objects, one, render


def test_the_service() -> None:
    given = at("service", {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}})
    callers = at("networkPolicy.api.from", [{"ipBlock": {"cidr": "10.0.0.0/8"}}])
    values = merged(given, callers, at("apiKeys.existingSecret", "keys"))
    service = one(objects(values), "Service", "-api")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {"a": "b"}
    (port,) = service["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (80, "serve")
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "api"
    # pods of an old and a new cluster: it must not name one
    assert not any(label.startswith("ray.io/") for label in service["spec"]["selector"])


def test_there_is_no_way_from_outside_unless_it_is_asked_for() -> None:
    found = objects()
    assert not named(found, "Ingress") + named(found, "HTTPRoute")


def test_the_ingress() -> None:
    found = objects(INGRESS)
    ingress = one(found, "Ingress")
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/proxy-body-size": "256m"}
    assert ingress["spec"]["tls"] == [{"secretName": "speech-tls", "hosts": ["speech.example.com"]}]
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "speech.example.com"
    (path,) = rule["http"]["paths"]
    backend = path["backend"]["service"]
    service = one(found, "Service", "-api")
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    plain = one(objects(merged(INGRESS, at("ingress", {"tlsSecret": "", "className": ""}))), "Ingress")
    assert not {"tls", "ingressClassName"} & set(plain["spec"])


def test_the_route() -> None:
    """Each field, for there is no schema of it here (Gateway API, v1)."""
    found = objects(merged(ROUTE, at("service.port", 80)))
    route = one(found, "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"] == {
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["speech.example.com"],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                "backendRefs": [{"name": one(found, "Service", "-api")["metadata"]["name"], "port": 80}],
                "timeouts": {"request": "3600s"},
            }
        ],
    }
    bare = one(objects(merged(ROUTE, at("route", {"hostnames": [], "timeout": ""}))), "HTTPRoute")
    assert "hostnames" not in bare["spec"]
    assert "timeouts" not in bare["spec"]["rules"][0]


def test_keys_may_be_left_out_by_a_word() -> None:
    open_ = merged(INGRESS, at("apiKeys", {"existingSecret": "", "allowAnonymous": True}))
    assert named(objects(open_), "Ingress")


def notes(values: dict[str, Any]) -> str:
    return render(values, name="x", namespace="asr")[NOTES]


def test_the_notes_tell_what_to_do_next() -> None:
    said = notes(at("service.port", 80))
    assert "kubectl -n asr wait rayservice/x-whisper-serve --for=condition=Ready" in said
    assert "port-forward service/x-whisper-serve-api 8000:80" in said
    assert "Authorization" not in said


def test_the_notes_tell_where_the_keys_are() -> None:
    assert "get secret x-whisper-serve-api-keys -o jsonpath='{.data.keys}'" in notes(ROUTE)
    existing = notes(at("apiKeys", {"existingSecret": "mine", "key": "list"}))
    assert "get secret mine -o jsonpath='{.data.list}'" in existing


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "the API has no keys"),
        (at("rayAuth.enabled", False), "token authentication is off"),
        (at("networkPolicy.enabled", False), "network policies are off"),
        (CONTROLLER, "monitoring is not enabled"),
    ],
)
def test_the_notes_warn(values: dict[str, Any], said: str) -> None:
    assert said in notes(values)
    assert said not in notes(CASES["production"])
