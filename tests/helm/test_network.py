"""templates/networkpolicies.yaml: who reaches whom, worked out as a network plugin does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helm.cases import CASES, CONTROLLER, INGRESS, SPLIT
from tests.helm.rendering import Object, at, merged, named, objects, one, pods
from tests.helm.test_matrix import picked


@dataclass(frozen=True)
class Peer:
    labels: dict[str, str]
    namespace: dict[str, str] = field(default_factory=lambda: {"kubernetes.io/metadata.name": "asr"})


def of(found: list[Object], component: str) -> Peer:
    return Peer(pods(found)[component]["metadata"]["labels"])


STRANGER = Peer({"app": "other"})
ELSEWHERE = Peer({"app": "other"}, {"kubernetes.io/metadata.name": "other"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay"})
GATEWAY = Peer({"app": "nginx"}, {"kubernetes.io/metadata.name": "ingress-nginx"})


def fits(selector: Object | None, labels: dict[str, str]) -> bool:
    return selector is not None and bool(picked(selector, {"it": labels}))


def matches(peer: Object, who: Peer) -> bool:
    """Is it one of a rule's peers? Addresses are not pods'."""
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        at_home = fits(peer["namespaceSelector"], who.namespace)
    else:
        at_home = who.namespace["kubernetes.io/metadata.name"] == "asr"
    return at_home and fits(peer.get("podSelector", {}), who.labels)


def lets(found: list[Object], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    """Do the policies of ``pod`` let it talk with ``other``? A pod that none selects is free."""
    if pod.namespace["kubernetes.io/metadata.name"] != "asr":
        return True
    policies = [
        policy["spec"]
        for policy in named(found, "NetworkPolicy")
        if fits(policy["spec"]["podSelector"], pod.labels) and direction in policy["spec"]["policyTypes"]
    ]
    if not policies:
        return True
    end = "from" if direction == "Ingress" else "to"
    return any(
        (end not in rule or any(matches(peer, other) for peer in rule[end]))
        and ("ports" not in rule or any(each["port"] == port for each in rule["ports"]))
        for policy in policies
        for rule in policy.get(direction.lower()) or []
    )


def reaches(found: list[Object], source: Peer, target: Peer, port: int) -> bool:
    return lets(found, "Egress", source, target, port) and lets(found, "Ingress", target, source, port)


EVERYTHING = merged(CASES["production"], at("networkPolicy.api.from", []))


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        ("api", "colocated", 12345, True),
        ("colocated", "head", 6379, True),
        ("head", "api", 20000, True),
        ("head", "redis", 6379, True),
        ("head", "redis", 22, False),
        ("api", "redis", 6379, False),
        ("colocated", "redis", 6379, False),
        ("controller", "head", 8265, True),
        ("controller", "head", 6379, False),
        ("controller", "api", 8000, False),
        ("controller", "redis", 6379, False),
        ("api", "controller", 9100, False),
        ("redis", "head", 8265, False),
    ],
)
def test_pods_of_the_release(source: str, target: str, port: int, expected: bool) -> None:
    found = objects(EVERYTHING)
    assert reaches(found, of(found, source), of(found, target), port) is expected


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        (STRANGER, "api", 8000, True),
        (ELSEWHERE, "api", 8000, False),
        (STRANGER, "api", 8080, False),
        (STRANGER, "head", 8265, False),
        (STRANGER, "head", 10001, False),
        (STRANGER, "colocated", 8000, False),
        (STRANGER, "redis", 6379, False),
        (STRANGER, "controller", 9100, False),
        (PROMETHEUS, "colocated", 8080, True),
        (PROMETHEUS, "head", 44217, True),
        (PROMETHEUS, "controller", 9100, True),
        (PROMETHEUS, "head", 8265, False),
        (OPERATOR, "head", 8265, True),
        (OPERATOR, "head", 6379, False),
        (OPERATOR, "api", 8000, False),
    ],
)
def test_pods_of_others(source: Peer, target: str, port: int, expected: bool) -> None:
    found = objects(EVERYTHING)
    assert reaches(found, source, of(found, target), port) is expected


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        ("controller", PROMETHEUS, 9090, True),
        ("controller", PROMETHEUS, 22, False),
        ("api", PROMETHEUS, 9090, False),
        ("api", STRANGER, 80, False),
        ("redis", STRANGER, 80, False),
        ("redis", ELSEWHERE, 53, True),
        ("colocated", ELSEWHERE, 53, True),
    ],
)
def test_what_pods_reach_outside(source: str, target: Peer, port: int, expected: bool) -> None:
    found = objects(EVERYTHING)
    assert reaches(found, of(found, source), target, port) is expected


def test_every_pod_is_denied_by_default() -> None:
    found = objects(EVERYTHING)
    policy = one(found, "NetworkPolicy", "-default-deny")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy
    assert "egress" not in policy
    for name in pods(found):
        assert fits(policy["podSelector"], of(found, name).labels), name


def test_stage_groups_are_among_rays_pods() -> None:
    found = objects(SPLIT)
    assert reaches(found, of(found, "api"), of(found, "decoder"), 30000)
    assert reaches(found, of(found, "encoder"), of(found, "decoder"), 30000)


def test_who_may_call_is_said() -> None:
    found = objects(INGRESS)
    assert reaches(found, GATEWAY, of(found, "api"), 8000)
    assert not reaches(found, STRANGER, of(found, "api"), 8000)


def addresses(found: list[Object], component: str) -> set[tuple[str, int]]:
    """Address blocks and ports that a pod may reach."""
    labels = of(found, component).labels
    return {
        (peer["ipBlock"]["cidr"], port["port"])
        for policy in named(found, "NetworkPolicy")
        if fits(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("egress") or []
        for peer in rule.get("to", [])
        if "ipBlock" in peer
        for port in rule["ports"]
    }


def test_only_controller_and_autoscaler_reach_the_api_server() -> None:
    values = merged(CONTROLLER, at("networkPolicy.apiServer", {"cidrs": ["10.0.0.1/32"], "ports": [443]}))
    found = objects(values)
    assert addresses(found, "controller") == addresses(found, "head") == {("10.0.0.1/32", 443)}
    assert addresses(found, "api") == addresses(found, "colocated") == set()
    assert addresses(objects(at("autoscaling.by", "none")), "head") == set()


def test_stages_reach_the_internet_to_download_and_not_else() -> None:
    values = {"weights": {"download": True}, "settings": {"model": {"source": "base"}}}
    found = objects(values)
    assert addresses(found, "colocated") == {("0.0.0.0/0", 443)}
    assert addresses(found, "api") == set()
    assert addresses(objects(), "colocated") == set()


def test_redis_outside_is_reached_on_its_port_alone() -> None:
    found = objects(CASES["external-redis"])
    assert reaches(found, of(found, "head"), ELSEWHERE, 6380)
    assert not reaches(found, of(found, "head"), ELSEWHERE, 6379)
    assert not reaches(found, of(found, "api"), ELSEWHERE, 6380)


def test_more_can_be_opened() -> None:
    bucket: dict[str, Any] = {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 443}]}
    found = objects(at("networkPolicy.extraEgress", [bucket]))
    assert ("10.1.0.0/16", 443) in addresses(found, "api")


def test_there_may_be_none() -> None:
    assert named(objects(at("networkPolicy.enabled", False)), "NetworkPolicy") == []
