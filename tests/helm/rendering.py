"""Real Helm: its SDK as a library (helm-python-sdk), which renders, lints and checks values as the program does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import helm_python
import kubernetes_validate
import yaml

from tests.conftest import ROOT

CHART = ROOT / "helm" / "whisper-serve"
GOLDEN = ROOT / "tests" / "helm" / "golden"
NOTES = "whisper-serve/templates/NOTES.txt"

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast, where PyYAML has it."""

Object = dict[str, Any]
Values = Mapping[str, Any]


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def values_of(file: str) -> dict[str, Any]:
    """One of the chart's values files; ``values.yaml`` itself is always beneath them."""
    values: dict[str, Any] = yaml.safe_load((CHART / file).read_text()) or {}
    return values


def merged(*layers: Values) -> dict[str, Any]:
    """As Helm lays values over values: maps are merged, everything else is replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def at(path: str, value: object) -> dict[str, Any]:
    """``at("api.replicas", 3)`` is ``{"api": {"replicas": 3}}``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def render(values: Values | None = None, *, name: str = "speech", namespace: str = "asr") -> dict[str, str]:
    """Manifests and notes by template. Raises HelmError where the values do not work."""
    return chart().render(dict(values or {}), name=name, namespace=namespace)


def objects(values: Values | None = None, *, name: str = "speech", namespace: str = "asr") -> list[Object]:
    return list(parsed(render(values, name=name, namespace=namespace)))


def parsed(rendered: Mapping[str, str]) -> Iterator[Object]:
    for path, text in sorted(rendered.items()):
        if path != NOTES:
            yield from filter(None, yaml.load_all(text, Loader=LOADER))


@cache
def _valid(version: str, text: str) -> None:
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def check_built_in(each: Object, version: str) -> None:
    """Raises kubernetes_validate.ValidationError, for unknown fields too. What was right stays right."""
    _valid(version, json.dumps(each, sort_keys=True))


def one(found: list[Object], kind: str, suffix: str = "") -> Object:
    """The object of that kind whose name ends so."""
    matching = named(found, kind, suffix)
    assert len(matching) == 1, f"{len(matching)} × {kind} …{suffix}"
    return matching[0]


def named(found: list[Object], kind: str, suffix: str = "") -> list[Object]:
    return [each for each in found if each["kind"] == kind and each["metadata"]["name"].endswith(suffix)]


def manifest(rendered: Mapping[str, str]) -> str:
    """For golden files: all objects as YAML in one order, without what is random."""
    text = "".join(
        f"---\n# {path.removeprefix('whisper-serve/')}\n{part.strip()}\n"
        for path, whole in sorted(rendered.items())
        if path != NOTES and not path.endswith(("/rules.yaml", "/dashboards.yaml"))  # files as they are, tested so
        for part in re.split(r"(?m)^---\n", whole)
        if part.strip()
    )
    return re.sub(r"(?m)^(  (?:auth_token|password): )\S+$", r"\1<random>", text)


def ray_service(found: list[Object]) -> Object:
    spec: Object = one(found, "RayService")["spec"]
    return spec


def serve_config(found: list[Object]) -> Object:
    config: Object = yaml.safe_load(ray_service(found)["serveConfigV2"])
    return config


def arguments(found: list[Object]) -> Object:
    """The application's settings, as Serve gets them."""
    (application,) = serve_config(found)["applications"]
    args: Object = application["args"]
    return args


def ray_groups(found: list[Object]) -> dict[str, Object]:
    """Groups of Ray's nodes, the head's included, by component."""
    cluster = ray_service(found)["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def pods(found: list[Object]) -> dict[str, Object]:
    """All pod templates, by component."""
    templates = {name: group["template"] for name, group in ray_groups(found).items()}
    for each in found:
        if each["kind"] in ("Deployment", "StatefulSet"):
            template = each["spec"]["template"]
            templates[template["metadata"]["labels"]["app.kubernetes.io/component"]] = template
    return templates


def container(pod: Object) -> Object:
    first: Object = pod["spec"]["containers"][0]
    return first


def mounted(pod: Object) -> dict[str, str]:
    """Names of the first container's volumes by path."""
    return {mount["mountPath"]: mount["name"] for mount in container(pod).get("volumeMounts", [])}
