"""A Ray cluster as KubeRay makes one: a head with its dashboard, and workers of one GPU each.

    python -m tests.k8s.raycluster

starts it in a process of its own, for its address must not be found by others' ``ray.init()``; it ends with its
standard input. The GPUs are in name only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.conftest import ROOT, free_port

WORKERS = 3
GPU_NODE = "gpu_node"
"""Resource that only the workers have."""

TOKEN = "a-token-of-the-tests-for-this-cluster-alone"
"""KubeRay turns Ray's authentication on."""
HEADERS = {"Authorization": f"Bearer {TOKEN}"}

Stages = dict[str, int]


@dataclass(frozen=True)
class RayCluster:
    """dashboard: host:port. metrics: host:port of each node. http: port of Serve's proxy."""

    dashboard: str
    metrics: Sequence[str]
    http: int

    def deploy(self, *applications: dict[str, Any]) -> None:
        """As KubeRay does: all of Serve's configuration at once."""
        declaration = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http},
            "applications": list(applications),
        }
        url = f"http://{self.dashboard}/api/serve/applications/"
        response = httpx.put(url, json=declaration, headers=HEADERS, timeout=60)
        assert response.status_code == 200, response.text

    def application(self, name: str) -> dict[str, Any]:
        """Serve's details of it; empty while there are none."""
        response = httpx.get(f"http://{self.dashboard}/api/serve/applications/", headers=HEADERS, timeout=20)
        found: dict[str, Any] = response.json()["applications"].get(name, {}) if response.status_code == 200 else {}
        return found

    def targets(self, name: str) -> Stages:
        deployments = self.application(name).get("deployments", {})
        return {stage: deployments[stage]["target_num_replicas"] for stage in deployments if stage != "api"}

    def nodes(self, name: str) -> dict[str, list[str]]:
        """Where each stage's replicas are, those that start or stop included."""
        deployments = self.application(name).get("deployments", {})
        return {s: [r.get("node_id") or "" for r in deployments[s]["replicas"]] for s in deployments if s != "api"}

    def scale(self, name: str, stage: str, replicas: int) -> None:
        path = f"/api/v1/applications/{name}/deployments/{stage}/scale"
        url = f"http://{self.dashboard}{path}"
        response = httpx.post(url, json={"target_num_replicas": replicas}, headers=HEADERS, timeout=20)
        assert response.status_code == 200, response.text

    def is_running(self, name: str) -> bool:
        found = self.application(name)
        assert found.get("status") != "DEPLOY_FAILED", found["message"]
        return found.get("status") == "RUNNING"


@contextlib.contextmanager
def raycluster(**environment: str) -> Iterator[RayCluster]:
    folder = tempfile.mkdtemp(prefix="k8s")  # short, for the paths of sockets have a limit
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.k8s.raycluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": folder,
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            **environment,
        },
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the cluster did not start"
        yield RayCluster(**json.loads(line), http=free_port())
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    from ray.cluster_utils import Cluster

    ports = [free_port() for _ in range(WORKERS + 2)]
    head = {
        "num_cpus": 1,  # Ray starts as many processes ahead; replicas reserve none
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": ports[0],
        "metrics_export_port": ports[1],
    }
    out = os.dup(1)
    os.dup2(2, 1)  # Ray prints
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for port in ports[2:]:
        cluster.add_node(num_cpus=0, num_gpus=1, resources={GPU_NODE: 3}, metrics_export_port=port)
    dashboard = f"127.0.0.1:{ports[0]}"
    deadline = time.monotonic() + 60
    url = f"http://{dashboard}/api/serve/applications/"
    while not _answers(lambda: httpx.get(url, headers=HEADERS, timeout=5)):
        assert time.monotonic() < deadline, "the dashboard does not answer"
        time.sleep(0.1)
    said = {"dashboard": dashboard, "metrics": [f"127.0.0.1:{port}" for port in ports[1:]]}
    os.write(out, json.dumps(said).encode() + b"\n")
    os.close(out)
    sys.stdin.read()
    cluster.shutdown()


def _answers(ask: Callable[[], httpx.Response]) -> bool:
    try:
        return ask().status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
