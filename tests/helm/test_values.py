"""values.yaml, its schema and the README say the same; what cannot work is refused with a word on why."""

from __future__ import annotations

import json
from typing import Any

import helm_python
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.settings import Settings
from tests.helm.cases import CASES, CONTROLLER, INGRESS, ROUTE, SPLIT
from tests.helm.documented import Key, keys
from tests.helm.rendering import arguments, at, merged, objects, ray_groups, render, values_of
from tests.helm.write import README, SCHEMA, with_settings, with_table


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.path)
def test_every_value_is_explained_and_has_a_place_in_the_schema(key: Key) -> None:
    assert key.comment, "a comment above it says what it is"
    assert key.comment.endswith("."), key.comment
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    place = schema
    for name in key.path.split("."):
        place = place["properties"][name]
        if "$ref" in place:
            place = schema["$defs"][place["$ref"].removeprefix("#/$defs/")]
    if key.above:
        assert place["additionalProperties"] is False


def test_the_schema_has_no_value_that_is_not_there() -> None:
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    there = {key.path for key in keys()}

    def paths(place: dict[str, Any], path: str) -> None:
        for name, inner in place.get("properties", {}).items():
            below = f"{path}.{name}" if path else name
            assert below in there or below == "global" or path not in above, below
            if "$ref" not in inner:
                paths(inner, below)

    above = {"", *(key.path for key in keys() if key.above)}
    paths(schema, "")


def test_the_schema_is_one() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_knows_the_settings_of_today() -> None:
    schema = json.loads(SCHEMA.read_text())
    assert with_settings(schema) == schema, "python -m tests.helm.write"


def test_the_readme_has_the_values_of_today() -> None:
    assert with_table(README.read_text()) == README.read_text(), "python -m tests.helm.write"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("topolgy", "split", "topolgy"),
        ("topology", "mixed", "topology"),
        ("device", "auto", "device"),
        ("image.repository", "", "repository"),
        ("image.repository", "name:tag", "repository"),
        ("image.digest", "sha256:short", "digest"),
        ("image.pullPolicy", "Sometimes", "pullPolicy"),
        ("rayVersion", "latest", "rayVersion"),
        ("settings.decoder.slotz", 4, "slotz"),
        ("settings.decoder.slots", 0, "slots"),
        ("settings.decoder.slots", "many", "slots"),
        ("settings.scaling.sm_utilization", 75, "sm_utilization"),
        ("env", [{"name": "A"}], "env"),
        ("env", [{"name": "A", "value": 1}], "env"),
        ("groups.colocated.replicas", 0, "replicas"),
        ("groups.colocated.minReplicas", -1, "minReplicas"),
        ("groups.third", {}, "third"),
        ("groups.colocated.resources.limits", None, "limits"),
        ("groups.colocated.resources.limits.memory", "lots", "memory"),
        ("groups.colocated.objectStoreMiB", 10, "objectStoreMiB"),
        ("stagePods.gpuResource", "cpu", "gpuResource"),
        ("api.replicas", 0, "replicas"),
        ("api.replicas", 1.5, "replicas"),
        ("autoscaling.by", "keda", "by"),
        ("autoscaling.version", 2, "version"),
        ("controller.prometheusUrl", "prometheus:9090", "prometheusUrl"),
        ("controller.prometheusSelector", '{job="x"}', "prometheusSelector"),
        ("apiKeys.keys", ["short"], "keys"),
        ("apiKeys.keys", ["two words of a sentence"], "keys"),
        ("rayAuth.token", "secret", "token"),
        ("faultTolerance.redis", "builtin", "redis"),
        ("drain.timeoutSeconds", 0, "timeoutSeconds"),
        ("upgrade.strategy", "RollingUpdate", "strategy"),
        ("service.port", 70000, "port"),
        ("service.type", "ExternalName", "type"),
        ("route.timeout", "an hour", "timeout"),
        ("networkPolicy.api.from", [{}], "from"),
        ("networkPolicy.prometheus.peers", [], "peers"),
        ("networkPolicy.apiServer.cidrs", ["api-server"], "cidrs"),
        ("topologySpread.whenUnsatisfiable", "Never", "whenUnsatisfiable"),
        ("securityContext.runAsUser", 0, "runAsUser"),
        ("monitoring.scrapeIntervalSeconds", 0, "scrapeIntervalSeconds"),
        ("monitoring.labels", {"release": 1}, "release"),
        ("fullnameOverride", "UPPER", "fullnameOverride"),
    ],
)
def test_the_schema_refuses(path: str, value: object, said: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=said):
        render(at(path, value))


DOWNLOAD = {"weights": {"download": True}, "settings": {"model": {"source": "large-v3"}}}
CLAIM = {"weights": {"existingClaim": "w"}, "settings": {"model": {"source": "/models/base.pt"}}}

BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what works, what is changed in it, what is said
    "http": ({}, at("settings.http.replicas", 4), r"settings\.http is set by the chart: use api\.replicas"),
    "keys in settings": (
        {},
        at("settings.http.api_keys", ["sk-0123456789abcdef"]),
        r"use api\.replicas, service and apiKeys",
    ),
    "name": ({}, at("settings.app_name", "speech"), r"settings\.app_name is set by the chart"),
    "metrics": ({}, at("settings.metrics.port", 9090), r"settings\.metrics is set by the chart: .* on port 8080"),
    "device": ({}, at("settings.model.device", "cpu"), r"settings\.model\.device is set by the chart: use device"),
    "replicas": (
        {},
        at("settings.encoder.replicas", 4),
        r"settings\.encoder\.replicas is set by the chart: use groups",
    ),
    "resources": ({}, at("settings.decoder.resources", {"x": 1}), r"settings\.decoder\.resources is set by the chart"),
    "topology": ({}, at("settings.scaling.topology", "split"), r"settings\.scaling\.topology is set by the chart"),
    "limits": ({}, at("settings.scaling.pods.max_replicas", 3), r"settings\.scaling\.pods is set by the chart"),
    "min and max": (
        {},
        at("groups.colocated", {"minReplicas": 9}),
        r"minReplicas \(9\) is above its maxReplicas \(8\)",
    ),
    "too many at the start": ({}, at("groups.colocated.replicas", 9), r"replicas \(9\) is not between"),
    "too few at the start": (
        at("groups.colocated", {"minReplicas": 2, "replicas": 2}),
        at("groups.colocated.replicas", 1),
        r"replicas \(1\) is not between its minReplicas \(2\)",
    ),
    "zero": (
        merged(at("groups.colocated.minReplicas", 0), at("settings.scaling.zero_after_s", 600)),
        at("settings.scaling.zero_after_s", None),
        r"minReplicas is 0, which needs settings\.scaling\.zero_after_s",
    ),
    "GPUs of a pod": ({}, at("groups.colocated.gpusPerPod", 2), r"gpusPerPod is 2: .* exactly one GPU"),
    "shares": ({}, at("settings.encoder.num_gpus", 0.5), r"num_gpus add up to 1\.1, and a pod has one GPU"),
    "no share": ({}, at("settings.encoder.num_gpus", 0), r"num_gpus must be above 0 with device: cuda"),
    "shares in groups": (SPLIT, at("settings.encoder.num_gpus", 0.5), r"no effect with topology: split"),
    "shares on CPUs": (CASES["cpu"], at("settings.encoder.num_gpus", 0.4), r"no effect with device: cpu"),
    "thresholds without a policy": (
        CASES["single-gpu"],
        at("settings.scaling.cold_start_s", 30),
        r"settings\.scaling has no effect with autoscaling\.by: none",
    ),
    "no Prometheus": (CONTROLLER, at("controller.prometheusUrl", ""), r"needs controller\.prometheusUrl"),
    "slow scrapes": (
        merged(CONTROLLER, at("monitoring.enabled", True)),
        at("monitoring.scrapeIntervalSeconds", 15),
        r"stale_after_s \(5\) is too short for monitoring\.scrapeIntervalSeconds \(15\)",
    ),
    "DCGM without GPUs": (CASES["cpu"], at("controller.signals", "dcgm"), r"dcgm needs GPUs"),
    "DCGM's selector": (CONTROLLER, at("controller.dcgmSelector", 'job="dcgm"'), r"dcgmSelector has no effect"),
    "two sources of keys": (
        ROUTE,
        at("apiKeys.existingSecret", "keys"),
        r"apiKeys\.existingSecret and apiKeys\.keys: one of them",
    ),
    "open ingress": (INGRESS, at("apiKeys.existingSecret", ""), r"ingress\.enabled shows the API to the outside"),
    "open route": (ROUTE, at("apiKeys.keys", []), r"route\.enabled shows the API to the outside"),
    "closed ingress": (INGRESS, at("networkPolicy.api.from", []), r"ingress\.enabled needs networkPolicy\.api\.from"),
    "closed route": (ROUTE, at("networkPolicy.api.from", []), r"route\.enabled needs networkPolicy\.api\.from"),
    "closed load balancer": (
        at("apiKeys.existingSecret", "keys"),
        at("service.type", "LoadBalancer"),
        r"service\.type: LoadBalancer needs networkPolicy\.api\.from",
    ),
    "open load balancer": (
        at("networkPolicy.enabled", False),
        at("service.type", "LoadBalancer"),
        r"service\.type: LoadBalancer shows the API to the outside",
    ),
    "ingress of no host": (INGRESS, at("ingress.host", ""), r"needs ingress\.host"),
    "route of no gateway": (ROUTE, at("route.parentRefs", []), r"needs route\.parentRefs"),
    "two volumes of weights": (CLAIM, at("weights.image", "w:1"), r"existingClaim and weights\.image: one of them"),
    "weights that are not read": (
        CLAIM,
        at("settings.model.source", "embedded:base"),
        r"source \(embedded:base\) is not there",
    ),
    "weights that are not there": (
        CLAIM,
        at("weights.existingClaim", ""),
        r"name weights\.existingClaim or weights\.image",
    ),
    "download": (
        DOWNLOAD,
        at("weights.download", False),
        r"large-v3 is downloaded when a pod starts: say weights\.download",
    ),
    "no download": (DOWNLOAD, at("settings.model.source", "embedded:base"), r"weights\.download has no effect"),
    "Redis without address": (
        CASES["external-redis"],
        at("faultTolerance.address", "redis.cache.svc"),
        r"needs faultTolerance\.address",
    ),
    "address without Redis": (CASES["external-redis"], at("faultTolerance.redis", "none"), r"address has no effect"),
    "user of the bundled Redis": (
        at("faultTolerance.redis", "bundled"),
        at("faultTolerance.username", "ray"),
        r"username has no effect",
    ),
    "secret without Redis": ({}, at("faultTolerance.existingSecret", "s"), r"existingSecret has no effect"),
    "token without authentication": (
        at("rayAuth.existingSecret", "s"),
        at("rayAuth.enabled", False),
        r"rayAuth\.existingSecret has no effect",
    ),
    "KubeRay's variables": ({}, at("env", [{"name": "RAY_AUTH_TOKEN", "value": "x"}]), r"RAY_AUTH_TOKEN is set by"),
}


@pytest.mark.parametrize(("works", "change", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_work_is_refused(works: dict[str, Any], change: dict[str, Any], said: str) -> None:
    render(works)
    with pytest.raises(helm_python.HelmRenderError, match=said):
        render(merged(works, change))


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = merged(
        at("groups.colocated.replicas", 9), at("ingress.enabled", True), at("faultTolerance.redis", "external")
    )
    with pytest.raises(helm_python.HelmRenderError) as refused:
        render(wrong)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("- ")]
    assert len(lines) == 5  # replicas, where from, keys, host, Redis' address


pods = st.integers(0, 40)


@settings(max_examples=60, deadline=None)
@given(
    least=pods, start=pods, most=pods, by=st.sampled_from(["serve", "none"]), cuda=st.booleans(), split=st.booleans()
)
def test_numbers_that_are_taken_are_ordered(
    least: int, start: int, most: int, by: str, cuda: bool, split: bool
) -> None:
    group = {"minReplicas": least, "replicas": start, "maxReplicas": most}
    groups = ("features", "encoder", "decoder") if split else ("colocated",)
    values = {
        "autoscaling": {"by": by},
        "device": "cuda" if cuda else "cpu",
        "topology": "split" if split else "colocated",
        "groups": dict.fromkeys(groups, group),
    }
    possible = start >= 1 and most >= 1 and (by == "none" or 1 <= least <= start <= most)
    try:
        found = objects(values)
    except helm_python.HelmError:
        assert not possible
        return
    assert possible
    for name in groups:
        rendered = ray_groups(found)[name]
        assert rendered["minReplicas"] <= rendered["replicas"] == start <= rendered["maxReplicas"]
    assert Settings(**arguments(found)).encoder.replicas == start


def test_shares_of_a_gpu_are_those_of_the_settings() -> None:
    """The chart has to name them for the policy, so it has them a second time."""
    filled = Settings().filled(on_gpu=True)
    for stage, part in ((stage, arguments(objects())[stage]) for stage in ("features", "encoder", "decoder")):
        assert part["num_gpus"] == getattr(filled, stage).num_gpus


def test_large_numbers_stay_whole() -> None:
    """Helm reads all numbers as floating point and would write 2^28 as 2.68e+08."""
    given_ = {"settings": {"audio": {"max_upload_bytes": 2**28 + 1, "max_decoded_bytes": 2**40 + 1}}}
    audio = Settings(**arguments(objects(given_))).audio
    assert (audio.max_upload_bytes, audio.max_decoded_bytes) == (2**28 + 1, 2**40 + 1)


def test_defaults_of_the_chart_are_in_one_place() -> None:
    """No values file repeats a default."""
    defaults = values_of("values.yaml")
    for file in ("values-cpu.yaml", "values-single-gpu.yaml", "values-production.yaml"):
        for path, value in leaves(values_of(file)):
            place: Any = defaults
            for name in path:
                place = place.get(name) if isinstance(place, dict) else None
            assert place != value, f"{file}: {'.'.join(path)}"


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in values.items():
        is_leaf = not isinstance(value, dict) or name == "resources"  # what belongs together may repeat a part
        found += [((*path, name), value)] if is_leaf else leaves(value, (*path, name))
    return found
