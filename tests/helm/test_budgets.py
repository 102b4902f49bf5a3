"""templates/pdb.yaml."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.cases import CASES, CONTROLLER, SPLIT
from tests.helm.rendering import at, merged, named, objects


def budgets(values: dict[str, Any]) -> dict[str, int]:
    return {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["minAvailable"]
        for each in named(objects(values), "PodDisruptionBudget")
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"api": 1}),
        (CASES["single-gpu"], {}),
        (CASES["production"], {"api": 3, "colocated": 1, "controller": 1}),
        (merged(SPLIT, CONTROLLER), {"api": 1, "encoder": 1, "decoder": 2, "controller": 1}),
        (at("podDisruptionBudget.head", True), {"api": 1, "head": 1}),
        (at("podDisruptionBudget.enabled", False), {}),
        # fixed numbers are their own floor
        (merged(at("autoscaling.by", "none"), at("groups.colocated.replicas", 4)), {"api": 1, "colocated": 3}),
    ],
)
def test_a_floor_less_one_stays(values: dict[str, Any], expected: dict[str, int]) -> None:
    assert budgets(values) == expected


def test_kubernetes_can_count_them() -> None:
    """For pods whose owner has no scale, as KubeRay's, a budget may have minAvailable as a number and nothing else."""
    for each in named(objects(CASES["production"]), "PodDisruptionBudget"):
        assert isinstance(each["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in each["spec"]
