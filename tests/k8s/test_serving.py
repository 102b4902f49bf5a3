"""The controller with real Ray Serve and a real Prometheus: replicas follow the load, and what happens when parts go.

One Ray cluster, as KubeRay makes it, for all of them; the API server alone is a stand-in.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.scaling.readings import STAGES
from serve_app.scaling.replay import Entry, read, replay
from tests.e2e.test_scaling import CLIP_S, MICRO, Load, beginning
from tests.engine.checkpoints import random_tensors, write_openai
from tests.k8s import pods
from tests.k8s.apiserver import ApiServer
from tests.k8s.controller import Operator, Process, wait_until, written
from tests.k8s.raycluster import TOKEN, WORKERS, RayCluster, raycluster
from tests.prometheus import prometheus

pytestmark = pytest.mark.timeout(1200)

PRODUCT = "whisper"
TICK_S = 1.0
HOLD_S = 4.0
"""How long fewer replicas must suffice."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    # as the chart sets it: Serve fills a pod before it takes the next
    with raycluster(RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY="1") as cluster:
        yield cluster


class Scraper:
    """A Prometheus that can be stopped and started, at another address."""

    def __init__(self, folder: Path, cluster: RayCluster):
        self._folder, self._cluster = folder, cluster
        self._running = contextlib.ExitStack()
        self.url = ""

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self.url = self._running.enter_context(prometheus(self._folder, self._cluster.metrics)).url

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def scraper(cluster: RayCluster, tmp_path: Path) -> Iterator[Scraper]:
    scraper = Scraper(tmp_path / "prometheus", cluster)
    scraper.start()
    yield scraper
    scraper.stop()


class Controllers:
    """Processes with one file, beside one API server."""

    def __init__(self, folder: Path, server: ApiServer, scraper: Scraper):
        self._folder, self._scraper = folder, scraper
        self._kubeconfig = server.kubeconfig(folder / "kubeconfig")
        self._file = folder / "controller.yaml"
        self._started: list[Process] = []
        self.operator = Operator(server)

    def configure(self, **changes: Any) -> None:
        token = self._folder / "token"
        token.write_text(f"{TOKEN}\n")
        always = {"dashboard_url": "http://{service}", "ray_token_file": str(token), "tick_s": TICK_S}
        written(self._file, prometheus=self._scraper.url, changes={**always, **changes})

    def start(self) -> Process:
        self._started.append(Process(self._file, self._kubeconfig, self._folder / f"log-{len(self._started)}"))
        return self._started[-1]

    def end(self) -> None:
        for process in self._started:
            process.end()


@pytest.fixture
def controllers(tmp_path: Path, server: ApiServer, scraper: Scraper) -> Iterator[Controllers]:
    controllers = Controllers(tmp_path, server, scraper)
    yield controllers
    controllers.end()


def are(count: int) -> dict[str, int]:
    return dict.fromkeys(STAGES, count)


def settled(cluster: RayCluster, application: str, counts: dict[str, int]) -> Callable[[], bool]:
    """Are there so many replicas, all of which run?"""

    def reached() -> bool:
        deployments = cluster.application(application).get("deployments", {})
        states = {s: [r["state"] for r in deployments[s]["replicas"]] for s in counts if s in deployments}
        return states == {stage: ["RUNNING"] * count for stage, count in counts.items()}

    return reached


def rounds_to(process: Process, reached: Callable[[], bool]) -> int:
    """Rounds of the controller's until it is so."""

    def rounds() -> float:
        return sum(process.rounds(outcome) for outcome in ("ok", "no_signals"))

    before = rounds()
    wait_until("it is asked for again", reached, 20)
    return int(rounds() - before)


def test_pods_come_and_go_whole_and_numbers_are_asserted_again(cluster: RayCluster, controllers: Controllers) -> None:
    """The pods' stages tell nothing, so only limits move their number."""
    operator = controllers.operator

    def limits(least: int, most: int) -> dict[str, Any]:
        return {
            "application": "pods",
            "scaling": {"topology": "colocated", "pods": {"min_replicas": least, "max_replicas": most}},
        }

    def take_whole(count: int) -> None:
        """KubeRay's autoscaler takes idle pods only."""
        controllers.configure(**limits(count, count))
        wait_until(f"there are {count}", settled(cluster, "pods", are(count)), 180)
        nodes = [set(ids) for ids in cluster.nodes("pods").values()]
        assert len(nodes[0]) == count
        assert nodes == [nodes[0]] * len(STAGES)

    cluster.deploy(pods.declaration())
    wait_until("the pods are up", lambda: cluster.is_running("pods"), 300)
    operator.rayservice(cluster.dashboard)
    controllers.configure(**limits(WORKERS, WORKERS), dry_run=True)
    process = controllers.start()
    wait_until("it decides", lambda: process.rounds("ok") > 2, 90)
    assert process.metric("whisper_scaling_wanted_replicas", stage="encoder") == WORKERS
    assert cluster.targets("pods") == are(1)
    assert operator.events("ScaledUp") == []
    controllers.configure(**limits(WORKERS, WORKERS))
    wait_until("all pods are taken", settled(cluster, "pods", are(WORKERS)), 180)
    assert {event["note"].partition(" (")[0] for event in operator.events("ScaledUp")} == {
        "features 1 → 3, encoder 1 → 3, decoder 1 → 3"
    }

    take_whole(2)

    # another active cluster, which begins with its configuration's sizes
    operator.rayservice(None)
    wait_until("it has none", lambda: process.rounds("no_cluster") > 0, 10)
    for stage in STAGES:
        cluster.scale("pods", stage, 1)
    assert cluster.targets("pods") == are(1)
    operator.rayservice(cluster.dashboard.replace("127.0.0.1", "localhost"), cluster="whisper-raycluster-b")
    assert rounds_to(process, lambda: cluster.targets("pods") == are(2)) <= 2
    wait_until(
        "it is told",
        lambda: any("whisper-raycluster-b" in event["note"] for event in operator.events("Reasserted")),
        10,
    )
    wait_until("there are 2", settled(cluster, "pods", are(2)), 180)
    take_whole(1)
    controllers.configure(**limits(2, 3))
    wait_until("2 are asked for", lambda: cluster.targets("pods") == are(2), 10)

    # another configuration of Serve's
    cluster.deploy(pods.declaration(version=1))
    wait_until("it is deployed anew", lambda: cluster.targets("pods") in (are(1), are(2)), 180)
    assert rounds_to(process, lambda: cluster.targets("pods") == are(2)) <= 2
    # one that is not for others to scale
    cluster.deploy(pods.declaration(version=2, external=False))
    wait_until("it is told", lambda: bool(operator.events("ExternalScalingOff")), 180)
    assert "external_scaler_enabled: true" in operator.events("ExternalScalingOff")[0]["note"]
    assert "Traceback" not in process.log


def test_replicas_follow_the_load_and_stay_where_nothing_is_known(
    cluster: RayCluster, controllers: Controllers, scraper: Scraper, sample: Path, tmp_path: Path
) -> None:
    operator = controllers.operator
    model = write_openai(tmp_path / "micro.pt", random_tensors(MICRO), MICRO)
    cluster.deploy(
        {
            "name": PRODUCT,
            "route_prefix": "/",
            "import_path": "serve_app.deployed:application",
            "external_scaler_enabled": True,
            "args": {
                "model": {"source": str(model), "device": "cpu"},
                "features": {"threads": 1},
                "encoder": {"threads": 1},
                "decoder": {"threads": 1, "max_tokens": 40, "slots": 2},
            },
        }
    )
    wait_until("the product is up", lambda: cluster.is_running(PRODUCT), 300)
    log = tmp_path / "decisions.jsonl"
    settings = {
        "gpus": dict.fromkeys(STAGES, 0.0),
        "scaling": {
            "topology": "split",
            **{stage: {"max_replicas": 2} for stage in STAGES},
            "cold_start_s": 10.0,
            "down_hold_s": HOLD_S,
            "panic_window_s": HOLD_S,
            "stale_after_s": 10.0,
            "decision_log": str(log),
        },
    }
    controllers.configure(**settings)
    operator.rayservice(cluster.dashboard)
    first = controllers.start()

    def entries() -> list[Entry]:
        while log.exists():
            with contextlib.suppress(ValueError):  # a line that is being written
                return [line for line in read(log) if isinstance(line, Entry)]
        return []

    def latest() -> Entry:
        return entries()[-1]

    def known() -> bool:
        """Has it been for a while? The first rates are of nearly empty batches."""
        return sum(entry.decision.units["decoder"].rate is not None for entry in entries()) > 10

    def target() -> int:
        return cluster.targets(PRODUCT)["decoder"]

    load = Load(f"http://127.0.0.1:{cluster.http}", beginning(sample, CLIP_S))
    try:
        wait_until("it leads", first.leads, 90)
        wait_until("its rate is known, and one suffices", lambda: known() and target() == 1, 300)
        rate = latest().decision.units["decoder"].rate
        assert rate is not None

        load.rate = 2 * rate / CLIP_S  # what comes too much is waited for by all that follow
        wait_until("another decoder is asked for", lambda: target() == 2, 120)
        load.rate = 0.9 * rate / CLIP_S  # which one could just do, without headroom
        wait_until("it runs", lambda: latest().signals.stages["decoder"].ready == 2, 300)
        assert any(e["note"].startswith("decoder 1 → 2 (") for e in operator.events("ScaledUp"))
        assert (first.metric("whisper_controller_signal_age_seconds", stage="decoder") or 99) < 10

        # the next leader knows what the last one learned
        second = controllers.start()
        second.url()
        first.send(signal.SIGKILL)
        assert wait_until("the second leads", second.leads, 10) < 10
        assert any("from what the leader before left" in event["note"] for event in operator.events("Leading"))
        wait_until("it goes on", lambda: second.rounds("ok") > 0, 10)

        # without Prometheus nobody knows that the load is gone
        told = len(operator.events("SignalsStale"))  # of a replica whose first second came late, perhaps
        scraper.stop()
        load.rate = 0.02
        wait_until("it is told why", lambda: bool(operator.events("PrometheusUnreachable")), 120)
        wait_until("it is told", lambda: len(operator.events("SignalsStale")) > told, 120)
        time.sleep(3 * HOLD_S)
        assert target() == 2
        age = second.metric("whisper_controller_signal_age_seconds", stage="decoder")
        assert age is not None
        assert age > 10
        assert second.running

        scraper.start()
        controllers.configure(**settings)
        wait_until("it has gone", lambda: target() == 1, 300)
        wait_until("it is told", lambda: bool(operator.events("SignalsFresh")), 90)
        assert any(e["note"].startswith("decoder 2 → 1 (fewer)") for e in operator.events("ScaledDown"))
        assert second.metric("whisper_scaling_decisions_total", stage="decoder", direction="down", reason="fewer")
    finally:
        statuses = load.end()
    assert (set(statuses), load.failures) == ({200}, [])
    count, differences = replay(log)
    assert count > 0
    assert differences == []
