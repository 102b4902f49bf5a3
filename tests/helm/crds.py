"""Custom resources against their published definitions, unknown fields included.

An API server drops unknown fields of a custom resource without a word: a wrong name would be no error but a setting
that does nothing. So every object of the schema that names its properties allows no others here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT
from tests.helm.rendering import LOADER, Object

CRDS = ROOT.parent / "shared" / "k8s" / "crds"

FILES = {
    "RayService": "ray.io_rayservices.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "ServiceMonitor": "monitoring.coreos.com_servicemonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}


def strict(schema: Any) -> Any:
    """The schema with no unknown fields; Kubernetes' own words for JSON schema replaced."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result


@cache
def validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    if not CRDS.is_dir():
        pytest.skip(f"the definitions of custom resources are not at {CRDS}")
    definition = yaml.load((CRDS / FILES[kind]).read_text(), Loader=LOADER)
    (schema,) = [
        each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"] if each["name"] == version
    ]
    # any object's own fields, which a definition leaves to the API server
    schema = strict(schema) | {"required": ["apiVersion", "kind", "metadata", "spec"]}
    return jsonschema.Draft202012Validator(schema)


def check(resource: Object) -> None:
    """Raises jsonschema.ValidationError, or AssertionError where it is of another group or version."""
    kind = resource["kind"]
    group, version = resource["apiVersion"].split("/")
    assert FILES[kind].startswith(f"{group}_"), (kind, group)
    checked = {**resource, "metadata": {}}  # of type object and no more in a definition
    validator(kind, version).validate(checked)
