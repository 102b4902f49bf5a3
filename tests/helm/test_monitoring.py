"""templates/monitors.yaml, rules.yaml, dashboards.yaml and dcgm.yaml."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.helm.cases import CONTROLLER
from tests.helm.rendering import CHART, at, container, merged, named, objects, one, pods

STOCK = ROOT.parent / "shared" / "k8s" / "dcgm-exporter-default-counters.csv"


def test_there_is_nothing_unless_it_is_asked_for() -> None:
    found = objects(CONTROLLER)
    for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule"):
        assert named(found, kind) == []
    assert [each["metadata"]["name"] for each in named(found, "ConfigMap")] == ["speech-whisper-serve-controller"]


def test_all_of_rays_pods_are_scraped() -> None:
    values = merged(CONTROLLER, at("monitoring", {"enabled": True, "scrapeIntervalSeconds": 1, "labels": {"r": "p"}}))
    found = objects(values)
    monitor = one(found, "PodMonitor")
    assert monitor["metadata"]["labels"]["r"] == "p"
    ports = {port["name"] for port in container(pods(found)["head"])["ports"]}
    endpoints = {endpoint["port"]: endpoint for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert set(endpoints) == {"metrics", "as-metrics", "dash-metrics"} <= ports
    assert endpoints["metrics"]["interval"] == endpoints["metrics"]["scrapeTimeout"] == "1s"
    assert "ray.io/cluster" in monitor["spec"]["podTargetLabels"]
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["asr"]}


def test_the_controller_is_scraped_where_there_is_one() -> None:
    monitored = at("monitoring.enabled", True)
    assert named(objects(monitored), "ServiceMonitor") == []
    found = objects(merged(CONTROLLER, monitored))
    (endpoint,) = one(found, "ServiceMonitor")["spec"]["endpoints"]
    service = one(found, "Service", "-controller-metrics")
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("file", sorted((CHART / "rules").glob("*.yaml")), ids=lambda file: file.name)
def test_rules_are_the_files(file: Path) -> None:
    found = objects(at("monitoring", {"rules": True, "labels": {"release": "p"}}))
    rule = one(found, "PrometheusRule", f"-{file.stem}")
    assert rule["spec"] == yaml.safe_load(file.read_text())
    assert rule["metadata"]["labels"]["release"] == "p"
    assert len(named(found, "PrometheusRule")) == len(list((CHART / "rules").glob("*.yaml")))


@pytest.mark.parametrize("file", sorted((CHART / "dashboards").glob("*.json")), ids=lambda file: file.name)
def test_dashboards_are_the_files(file: Path) -> None:
    labels = {"dashboards": "yes"}
    found = objects(
        at("monitoring.dashboards", {"enabled": True, "labels": labels, "annotations": {"folder": "Speech"}})
    )
    config = one(found, "ConfigMap", f"-dashboard-{file.stem}")
    ((name, text),) = config["data"].items()
    assert name == file.name
    assert json.loads(text) == json.loads(file.read_text())
    assert labels.items() <= config["metadata"]["labels"].items()
    assert config["metadata"]["annotations"] == {"folder": "Speech"}
    assert len(json.dumps(config)) < 2**20, "a ConfigMap holds 1 MiB"


def counters(text: str) -> dict[str, str]:
    """Prometheus' type by field, as dcgm-exporter reads its file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    assert all(len(row) == 3 for row in rows), rows
    return {row[0]: row[1] for row in rows}


def test_sm_activity_is_turned_on_for_dcgm_exporter() -> None:
    values = at("dcgm", {"enabled": True, "namespace": "gpu-operator", "name": "counters"})
    config = one(objects(values), "ConfigMap", "counters")
    assert config["metadata"]["namespace"] == "gpu-operator"
    ((name, text),) = config["data"].items()
    assert name == "dcgm-metrics.csv"
    fields = counters(text)
    assert {"DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_PROF_DRAM_ACTIVE"} <= set(fields)
    assert set(fields.values()) <= {"gauge", "counter"}
    if not STOCK.is_file():
        pytest.skip(f"dcgm-exporter's own counters are not at {STOCK}")
    stock = STOCK.read_text()
    assert "DCGM_FI_PROF_SM_ACTIVE" not in counters(stock), "that is why this is there"
    assert set(fields) <= set(re.findall(r"DCGM_FI_\w+", stock)), "fields by their right names"
