"""No value of the chart does nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import helm_python
import pytest

from tests.helm.cases import CASES, CONTROLLER, INGRESS, ROUTE, SPLIT
from tests.helm.documented import Key, keys
from tests.helm.rendering import NOTES, at, manifest, merged, render

DASHBOARDS = at("monitoring", {"enabled": True, "rules": True, "dashboards": {"enabled": True}})
BUNDLED = at("faultTolerance.redis", "bundled")
OPEN = at("ingress", {"enabled": True, "host": "a.example.com"})

CONTEXTS: list[dict[str, Any]] = [
    {},
    merged(CONTROLLER, DASHBOARDS, BUNDLED, at("controller.signals", "dcgm"), at("dcgm.enabled", True)),
    merged(SPLIT, CONTROLLER, at("groups.features.replicas", 2)),
    at("groups.colocated.replicas", 2),
    INGRESS,
    merged(INGRESS, at("ingress.enabled", False)),
    ROUTE,
    merged(ROUTE, at("route.enabled", False)),
    merged(OPEN, at("networkPolicy.api.from", [{"podSelector": {}}])),
    at("apiKeys.existingSecret", "keys"),
    CASES["external-redis"],
    CASES["weights-image"],
    at("settings.model.source", "/models/x.pt"),
    at("settings.model.source", "large-v3"),
]
"""In one of these at least it has an effect."""

OTHERS: dict[str, Any] = {
    "image.digest": "sha256:" + "0" * 64,
    "image.pullPolicy": "Always",
    "imagePullSecrets": ["x"],
    "rayVersion": "2.61.0",
    "topology": "split",
    "device": "cpu",
    "settings": {"vad": {"threshold": 0.4}},
    "env": [{"name": "A", "value": "b"}],
    "groups.features.replicas": 3,
    "groups.encoder.replicas": 3,
    "groups.encoder.minReplicas": 1,
    "groups.encoder.gpusPerPod": 4,
    "groups.decoder.replicas": 4,
    "monitoring.scrapeIntervalSeconds": 1,
    "stagePods.gpuResource": "amd.com/gpu",
    "autoscaling.by": "none",
    "autoscaling.version": "v1",
    "autoscaling.upscalingMode": "Aggressive",
    "controller.prometheusUrl": "http://other:9090",
    "controller.signals": "application",
    "apiKeys.keys": ["sk-another-0123456789"],
    "faultTolerance.redis": "bundled",
    "faultTolerance.address": "other:1234",
    "faultTolerance.bundled.storage": "9Gi",
    "weights.imagePath": "/elsewhere",
    "weights.sizeLimit": "9Gi",
    "scratch.sizeLimit": "9Gi",
    "upgrade.strategy": "None",
    "service.type": "NodePort",
    "ingress.host": "other.example.com",
    "route.parentRefs": [{"name": "other"}],
    "route.hostnames": ["other.example.com"],
    "route.timeout": "10s",
    "networkPolicy.apiServer.cidrs": ["10.0.0.0/8"],
    "networkPolicy.apiServer.ports": [6443],
    "networkPolicy.extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    "topologySpread.topologyKeys": ["rack"],
    "topologySpread.whenUnsatisfiable": "DoNotSchedule",
}


ONLY_ONE = {"groups.colocated.gpusPerPod"}
"""It can be nothing else: tests/helm/test_values.py sees that refused."""


def another(key: Key) -> Any:
    """A value that it does not have by default."""
    if key.path in OTHERS:
        return OTHERS[key.path]
    match key.value, key.path.rsplit(".", 1)[-1]:
        case bool(value), _:
            return not value
        case int() | float() as value, _:
            return value + 1
        case str(), _:
            return "other"
        case _, "resources":
            return {"requests": {"cpu": "7"}}
        case _, "nodeSelector" | "annotations" | "labels":
            return {"other": "value"}
        case _, "tolerations":
            return [{"key": "other", "operator": "Exists"}]
        case _, "affinity":
            return {"nodeAffinity": {}}
        case _, "from" | "peers":
            return [{"podSelector": {"matchLabels": {"other": "value"}}}]
    raise AssertionError(f"another value for {key.path}?")


def rendered(values: dict[str, Any]) -> str | None:
    """None where the values do not work."""
    try:
        files = render(values)
    except helm_python.HelmError:
        return None
    as_they_are = (files[f"whisper-serve/templates/{name}.yaml"] for name in ("dashboards", "rules"))
    return "".join([manifest(files), *as_they_are])


@cache
def before(context: int) -> str | None:
    return rendered(CONTEXTS[context])


@pytest.mark.parametrize(
    "key", [key for key in keys() if not key.above and key.path not in ONLY_ONE], ids=lambda key: key.path
)
def test_every_value_changes_what_is_made(key: Key) -> None:
    given = at(key.path, another(key))
    afters = ((number, rendered(merged(context, given))) for number, context in enumerate(CONTEXTS))
    assert any(after is not None and after != before(number) for number, after in afters)


def test_annotations_of_accounts() -> None:
    files = render(at("serviceAccount.annotations", {"eks.amazonaws.com/role-arn": "arn"}))
    assert files["whisper-serve/templates/serviceaccounts.yaml"].count("eks.amazonaws.com/role-arn: arn") == 2
    assert NOTES in files
