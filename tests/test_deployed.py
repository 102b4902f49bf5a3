"""Serve's entry for KubeRay, in a cluster laid out like the chart's."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.deployed import application
from tests.conftest import free_port
from tests.helm.rendering import container, objects, ray_groups, serve_config, values_of

RAY = Path(sys.executable).with_name("ray")
KEY = "sk-0123456789abcdef"
STAGES = ("features", "encoder", "decoder")


def test_settings_that_are_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match="slotz"):
        application({"decoder": {"slotz": 4}})
    with pytest.raises(ValueError, match="no_such_section"):
        application({"no_such_section": {}})


@pytest.mark.parametrize("keys", [["sk-secret"], []])
def test_api_keys_are_no_arguments(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="api_keys_file") as refused:
        application({"http": {"api_keys": keys}})
    assert "sk-secret" not in str(refused.value)


@dataclass(frozen=True)
class Cluster:
    dashboard: httpx.Client
    """With the token that the whole cluster asks for."""

    def resources(self) -> dict[str, set[str]]:
        """Custom resources of each of Ray's nodes, by its id; the dashboard writes stage_encoder as stageEncoder."""
        nodes = self.dashboard.get("/nodes?view=summary").raise_for_status().json()["data"]["summary"]
        totals = {node["raylet"]["nodeId"]: node["raylet"]["resourcesTotal"] for node in nodes}
        ours = {"api": "api", **{f"stage{stage.title()}": f"stage_{stage}" for stage in STAGES}}
        return {id: {ours[name] for name in total if name in ours} for id, total in totals.items()}

    def deployed(self) -> Any:
        """What Serve tells of the application."""
        found = self.dashboard.get("/api/serve/applications/").raise_for_status().json()
        return found["applications"].get("whisper", {})


def wait_until(what: str, reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.3)


class Node:
    """``ray start`` as KubeRay runs it, until it is told to end."""

    def __init__(self, group: dict[str, Any], folder: Path, environment: dict[str, str], place: list[str]):
        resources = {name: int(amount) for name, amount in group["resources"].items()}
        cpus = resources.pop("CPU", 1)
        of_its_own = ("dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port")
        options = {
            **group["rayStartParams"],
            "num-cpus": cpus,
            "resources": json.dumps(resources),
            "object-spilling-directory": str(folder / "spill"),
            # pods have addresses of their own, these nodes have one
            **{name: free_port() for name in of_its_own},
        }
        self._command = [
            str(RAY),
            "start",
            "--block",
            *(f"--{name}={value}" for name, value in options.items()),
            *place,
        ]
        self._environment = environment
        self._starts = 0
        self._start()

    def _start(self) -> None:
        self._starts += 1
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT
        )

    def is_up(self) -> bool:
        log = Path(self._log.name).read_text()
        if self.process.poll() is not None:
            # Ray gives up after 30 s, which a busy machine may need; kubelet would start the container again, too
            assert "timed out during startup" in log, log[-2000:]
            assert self._starts < 4, log[-2000:]
            self._start()
        return "Ray runtime started" in log


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Ray's nodes from the groups of the chart for CPUs: the resources of each, its options, token authentication."""
    folder = Path(tempfile.mkdtemp(prefix="deployed"))  # short, for the paths of sockets have a limit
    port, dashboard, token = free_port(), free_port(), secrets.token_hex(24)
    groups = list(ray_groups(objects(values_of("values-cpu.yaml"))).values())  # the head's is the first
    variables = {each["name"]: each["value"] for each in container(groups[0]["template"])["env"]}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        **{name: value for name, value in variables.items() if name not in ("HOME", "XDG_CACHE_HOME")},
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # as KubeRay does for authOptions
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    nodes: list[Node] = []
    try:
        places = [["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]]
        places += [[f"--address=127.0.0.1:{port}"]] * (len(groups) - 1)
        for group, place in zip(groups, places, strict=True):  # one after the other: Ray gives a start 30 s
            nodes.append(Node(group, folder, environment, place))
            wait_until("a node is up", nodes[-1].is_up, 180)
        authorized = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{dashboard}", headers=authorized, timeout=120) as client:
            yield Cluster(client)
    finally:
        for node in reversed(nodes):
            node.process.send_signal(signal.SIGTERM)
        for node in nodes:
            try:
                node.process.wait(30)
            except subprocess.TimeoutExpired:
                node.process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)  # three nodes and four deployments to start
def test_the_charts_configuration_runs_where_the_chart_says(
    cluster: Cluster, tmp_path: Path, sample: Path, sample_text: str
) -> None:
    anonymous = httpx.get(f"{cluster.dashboard.base_url}/api/serve/applications/")
    assert anonymous.status_code == 401

    config = serve_config(objects({**values_of("values-cpu.yaml"), "apiKeys": {"existingSecret": "keys"}}))
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    config["applications"][0]["args"]["http"]["api_keys_file"] = str(keys)
    cluster.dashboard.put("/api/serve/applications/", json=config).raise_for_status()

    def runs() -> bool:
        status = cluster.deployed().get("status")
        assert status != "DEPLOY_FAILED", cluster.deployed()["message"]
        return bool(status == "RUNNING")

    wait_until("the application runs", runs, 300)
    resources = cluster.resources()
    for name, deployment in cluster.deployed()["deployments"].items():
        (replica,) = deployment["replicas"]
        wanted = {"api"} if name == "api" else {f"stage_{stage}" for stage in STAGES}
        assert resources[replica["node_id"]] == wanted, name

    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/-/healthz").status_code == 200  # the API pods' readiness probe

    def transcribe(key: str) -> httpx.Response:
        with sample.open("rb") as file:
            return httpx.post(
                f"{url}/v1/audio/transcriptions",
                files={"file": file},
                data={"model": "whisper-1", "response_format": "text"},
                headers={"Authorization": f"Bearer {key}"},
                timeout=300,
            )

    assert transcribe("sk-wrong").status_code == 401
    answer = transcribe(KEY)
    assert answer.status_code == 200, answer.text
    assert re.findall(r"[a-z']+", answer.text.lower()) == re.findall(r"[a-z']+", sample_text.lower())
    assert KEY not in cluster.dashboard.get("/api/serve/applications/").text
