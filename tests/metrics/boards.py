"""What the dashboards ask Prometheus, and what must run for it to have an answer."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import NamedTuple

from loadtest.dashboards.boards import boards
from serve_app import metrics
from tests.metrics.replayed import in_metrics

GPU, SCALING, CONTROLLER = "GPU", "scaling", "controller"

OF_GPUS = (
    metrics.SM_OCCUPANCY,
    metrics.TENSOR_ACTIVITY,
    metrics.DRAM_UTILIZATION,
    metrics.DRAM_BANDWIDTH,
    metrics.GPU_MEMORY_USED,
    metrics.GPU_MEMORY_TOTAL,
    metrics.GPU_POWER,
    metrics.GPU_TEMPERATURE,
    metrics.STAGE_GPU_SHARE,
    metrics.STAGE_TURN,
    metrics.STAGE_TURN_WAIT,
)
"""Metrics that an application without a GPU does not export."""

VARIABLES = {"$namespace": ".*", "$release": ".*", "$__rate_interval": "15s"}


class Asked(NamedTuple):
    """of: what must run besides the application."""

    board: str
    panel: str
    expression: str
    of: frozenset[str]


@cache
def asked() -> list[Asked]:
    """Every query of every panel, with Grafana's variables filled in."""
    return [
        Asked(name, panel["title"], expression, of(expression))
        for name, text in boards().items()
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", [])
        for expression in [filled(target["expr"])]
    ]


def filled(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def of(expression: str) -> frozenset[str]:
    written_out = in_metrics(expression)
    found = set()
    gpus = {metric.exported for metric in OF_GPUS}
    if gpus & set(re.findall(r"ray_whisper_\w+", written_out)) or 'kind!="cpu_busy"' in expression + written_out:
        found.add(GPU)
    if "whisper:scaling_" in expression:
        found.add(SCALING)
    if "whisper_controller_" in expression:
        found.add(CONTROLLER)
    return frozenset(found)
