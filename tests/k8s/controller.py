"""The controller as its own process, as a pod runs it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.k8s.apiserver import ADMIN, EVENTS, LEASES, RAY, ApiServer, Object, Request, Rule

NAMESPACE, RAYSERVICE, LEASE = "speech", "whisper", "whisper-autoscaler"

RULES = [
    Rule("ray.io", "rayservices", frozenset({"get"}), frozenset({RAYSERVICE})),
    Rule("coordination.k8s.io", "leases", frozenset({"get", "update"}), frozenset({LEASE})),
    Rule("coordination.k8s.io", "leases", frozenset({"create"})),
    Rule("events.k8s.io", "events", frozenset({"create"})),
]
"""What ``k8s`` says that it needs (its docstring), and no more."""


class Operator:
    """Who may do everything: the one who installs, and KubeRay."""

    def __init__(self, server: ApiServer):
        self._server = server

    def __call__(self, verb: str, version: str, plural: str, name: str | None = None, body: Any = None) -> Any:
        part = None
        if name is not None and "/" in name:
            name, part = name.split("/")
        request = Request(verb, version, plural, NAMESPACE, name, part, False, ADMIN)
        kind = "application/merge-patch+json" if verb == "patch" else "application/json"
        return self._server.answer(request, kind, json.dumps(body).encode())

    def rayservice(self, service: str | None, cluster: str = "whisper-raycluster-a") -> None:
        """Makes the RayService, or changes its status as KubeRay does. service: of the active cluster's head."""
        if not self("list", RAY, "rayservices")["items"]:
            self("create", RAY, "rayservices", body={"metadata": {"name": RAYSERVICE}, "spec": {}})
        active = {"rayClusterName": cluster, "rayClusterStatus": {"head": {"serviceName": service}}}
        status = {"status": {"activeServiceStatus": active if service else None}}
        self("patch", RAY, "rayservices", f"{RAYSERVICE}/status", body=status)

    def lease(self) -> Object:
        found: Object = self("get", LEASES, "leases", LEASE)
        return found

    def forget_lease(self) -> None:
        if self("list", LEASES, "leases")["items"]:
            self("delete", LEASES, "leases", LEASE)

    def touch_lease(self) -> None:
        """Writes it, and changes nothing of the election."""
        if self("list", LEASES, "leases")["items"]:
            self("patch", LEASES, "leases", LEASE, body={"metadata": {"labels": {"touched": "yes"}}})

    def take_lease(self, holder: str) -> None:
        self("patch", LEASES, "leases", LEASE, body={"spec": {"holderIdentity": holder}})

    def events(self, reason: str | None = None) -> list[Object]:
        """Oldest first."""
        events = self("list", EVENTS, "events")["items"]
        return [event for event in events if reason in (None, event["reason"])]


class Process:
    """A controller that runs. log: of its standard error."""

    def __init__(self, config: Path, kubeconfig: Path, log: Path):
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
        environment.pop("KUBERNETES_SERVICE_HOST", None)
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "k8s", "--config", str(config)], stderr=stderr, env=environment, cwd=ROOT
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        return self._process.wait(timeout=seconds)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def url(self) -> str:
        found: list[str] = []

        def said() -> bool:
            found[:] = re.findall(r"on port (\d+)", self.log)
            assert self.running or found, self.log
            return bool(found)

        wait_until("it tells its port", said, 20)
        return f"http://127.0.0.1:{found[0]}"

    def metric(self, name: str, **labels: str) -> float | None:
        """None where it is not shown."""
        families = text_string_to_metric_families(httpx.get(f"{self.url()}/metrics", timeout=10).text)
        samples = [s for family in families for s in family.samples if s.name == name and s.labels == labels]
        assert len(samples) <= 1
        return samples[0].value if samples else None

    def rounds(self, outcome: str) -> float:
        """That ended so."""
        return self.metric("whisper_controller_ticks_total", outcome=outcome) or 0

    def leads(self) -> bool:
        return self.metric("whisper_controller_leader") == 1

    def end(self) -> None:
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextlib.contextmanager
def running(config: Path, kubeconfig: Path, log: Path) -> Iterator[Process]:
    process = Process(config, kubeconfig, log)
    try:
        yield process
    finally:
        process.end()


def written(path: Path, *, prometheus: str, changes: Mapping[str, Any]) -> Path:
    """A controller's file."""
    settings = {
        "namespace": NAMESPACE,
        "rayservice": RAYSERVICE,
        "lease": LEASE,
        "prometheus_url": prometheus,
        "metrics_port": 0,
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def wait_until(what: str, reached: Callable[[], bool], seconds: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)  # asking costs those who are waited for
    return time.monotonic() - began
