"""templates/controller.yaml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import k8s
from k8s.config import ControllerSettings, parse
from k8s.exits import Exit
from tests.conftest import ROOT
from tests.helm.cases import CONTROLLER, SPLIT
from tests.helm.rendering import (
    Object,
    at,
    container,
    merged,
    mounted,
    named,
    objects,
    one,
    pods,
    ray_service,
)

MONITORED = merged(CONTROLLER, at("monitoring.enabled", True))


def config(values: dict[str, Any], **release: str) -> ControllerSettings:
    return parse(one(objects(values, **release), "ConfigMap", "-controller")["data"]["controller.yaml"])


def test_there_is_none_without_need() -> None:
    for values in ({}, at("autoscaling.by", "none")):
        found = objects(values)
        assert not named(found, "Deployment") + named(found, "Role") + named(found, "RoleBinding")
        assert not [each for each in found if each["metadata"]["name"].endswith("-controller")]


def test_its_file_says_whom_it_scales() -> None:
    settings = config(CONTROLLER, name="x", namespace="asr")
    assert (settings.namespace, settings.rayservice) == ("asr", "x-whisper-serve")
    assert settings.lease == "x-whisper-serve-controller"
    assert settings.prometheus_url == "http://prometheus.monitoring.svc:9090"
    assert (settings.tick_s, settings.dry_run, settings.signals) == (1.0, False, "application")


def test_what_can_be_said_to_it() -> None:
    values = {
        "controller": {
            "tickSeconds": 0.5,
            "dryRun": True,
            "signals": "dcgm",
            "dcgmSelector": 'job="dcgm-exporter"',
            "prometheusSelector": 'cluster="eu",job="ray"',
        },
        "settings": {"scaling": {"sm_utilization": 0.6, "cold_start_s": 120, "gpu_budget": 16}},
    }
    settings = config(merged(MONITORED, values))
    assert (settings.tick_s, settings.dry_run, settings.signals) == (0.5, True, "dcgm")
    assert settings.dcgm_selector == 'job="dcgm-exporter"'
    assert settings.prometheus_selector == 'cluster="eu",job="ray"'
    assert (settings.scaling.sm_utilization, settings.scaling.gpu_budget) == (0.6, 16)


def test_it_picks_the_series_that_the_charts_monitors_mark() -> None:
    assert config(CONTROLLER).prometheus_selector == ""
    matchers = dict(re.findall(r'(\w+)="([^"]*)"', config(MONITORED, name="x", namespace="asr").prometheus_selector))
    monitor = one(objects(MONITORED, name="x", namespace="asr"), "PodMonitor")
    (marked,) = [e for e in monitor["spec"]["podMetricsEndpoints"] if e["port"] == "metrics"]
    added = {r["targetLabel"]: r["replacement"] for r in marked["relabelings"]}
    # the operator itself adds a pod's namespace
    assert matchers == {"namespace": "asr", **added}


def test_limits_of_stage_groups_count_replicas() -> None:
    scaling = config(merged(CONTROLLER, SPLIT)).scaling
    assert scaling.topology == "split"
    assert (scaling.encoder.min_replicas, scaling.encoder.max_replicas) == (4, 32)  # pods of two GPUs
    assert (scaling.decoder.min_replicas, scaling.decoder.max_replicas) == (3, 24)


def test_new_thresholds_restart_nothing() -> None:
    before = objects(CONTROLLER)
    after = objects(merged(CONTROLLER, at("settings.scaling", {"sm_utilization": 0.6, "cold_start_s": 120})))
    changed = {each["kind"] for each, old in zip(after, before, strict=True) if each != old}
    assert changed == {"ConfigMap", "Secret"}  # Ray's token is random where there is no cluster to keep it


def test_its_rights_are_those_that_it_says_it_needs() -> None:
    """k8s/__init__.py has a table of them."""
    lines = re.findall(r"^(\S+\.\S+)\s+(\w+)\s+(\w+(?:, \w+)*)\s{2,}(.+)$", k8s.__doc__ or "", re.MULTILINE)
    assert len(lines) == 4
    service, lease = "speech-whisper-serve", "speech-whisper-serve-controller"
    names = {"the RayService": [service], "the Lease": [lease]}
    needed = {
        (group, resource, verbs, tuple(names.get(narrowed.strip(), []))) for group, resource, verbs, narrowed in lines
    }
    (role,) = named(objects(CONTROLLER), "Role")
    given = {
        (group, resource, ", ".join(rule["verbs"]), tuple(rule.get("resourceNames", [])))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert given == needed
    settings = config(CONTROLLER)
    assert (settings.rayservice, settings.lease) == (service, lease)


def test_the_rights_are_its_own() -> None:
    found = objects(CONTROLLER)
    (binding,) = named(found, "RoleBinding")
    account = {"kind": "ServiceAccount", "name": "speech-whisper-serve-controller", "namespace": "asr"}
    assert binding["subjects"] == [account]
    assert binding["roleRef"]["name"] == one(found, "Role")["metadata"]["name"]
    assert pods(found)["controller"]["spec"]["serviceAccountName"] == account["name"]


def test_its_pods() -> None:
    deployment = one(objects(merged(CONTROLLER, at("controller.replicas", 3))), "Deployment")
    assert deployment["spec"]["replicas"] == 3
    scheduled = merged(CONTROLLER, at("controller", {"nodeSelector": {"pool": "system"}, "annotations": {"a": "b"}}))
    template = pods(objects(scheduled))["controller"]
    assert template["spec"]["nodeSelector"] == {"pool": "system"}
    assert template["metadata"]["annotations"] == {"a": "b"}


def test_rays_token_is_where_its_file_says() -> None:
    def token(values: dict[str, Any]) -> tuple[Path | None, Object]:
        return config(values).ray_token_file, pods(objects(values))["controller"]

    path, pod = token(CONTROLLER)
    (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "ray-token"]
    ((item),) = volume["secret"]["items"]
    folder = {name: folder for folder, name in mounted(pod).items()}["ray-token"]
    assert str(path) == f"{folder}/{item['path']}"
    # KubeRay's name for it, in the Secret that Ray's pods have it from
    assert item["key"] == "auth_token"
    auth = ray_service(objects(CONTROLLER))["rayClusterConfig"]["authOptions"]
    assert volume["secret"]["secretName"] == auth["secretName"]
    path, pod = token(merged(CONTROLLER, at("rayAuth.enabled", False)))
    assert path is None
    assert "ray-token" not in mounted(pod).values()


def test_its_command_starts_it(tmp_path: Path) -> None:
    """As far as it comes without an API server: it takes the file, and says what is missing."""
    found = objects(CONTROLLER)
    main = container(pods(found)["controller"])
    folder = {name: folder for folder, name in mounted(pods(found)["controller"]).items()}["config"]
    (file,) = [argument for argument in main["args"] if argument.startswith(folder)]
    ((name, text),) = one(found, "ConfigMap", "-controller")["data"].items()
    assert file == f"{folder}/{name}"
    (tmp_path / name).write_text(text.replace("metrics_port: 9100", "metrics_port: 0"))
    arguments = [argument.replace(folder, str(tmp_path)) for argument in main["args"]]
    python, *command = main["command"]
    assert python == "python"
    ended = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env={**os.environ, "KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == Exit.API_LOST, ended.stderr
    assert "KUBECONFIG" in ended.stderr


def test_metrics_and_health_are_on_the_port_of_its_file() -> None:
    found = objects(CONTROLLER)
    main = container(pods(found)["controller"])
    (port,) = main["ports"]
    assert port["containerPort"] == config(CONTROLLER).metrics_port
    for probe in ("livenessProbe", "readinessProbe"):
        assert main[probe]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    (service_port,) = one(found, "Service", "-controller-metrics")["spec"]["ports"]
    assert (service_port["port"], service_port["targetPort"]) == (9100, port["name"])
