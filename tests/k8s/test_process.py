"""The controller's process beside the API server: how it starts, ends, and hands over. That another takes over when one
is killed is shown with real parts (``test_serving``)."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from k8s.exits import Exit
from tests.conftest import ROOT
from tests.k8s.apiserver import RAY, ApiServer
from tests.k8s.controller import RULES, Operator, Process, wait_until, written
from tests.prometheus import Prometheus, prometheus

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def scraper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), []) as server:
        yield server


@pytest.fixture
def file(tmp_path: Path, scraper: Prometheus) -> Path:
    return written(tmp_path / "controller.yaml", prometheus=scraper.url, changes={})


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path, file: Path, server: ApiServer) -> Iterator[Start]:
    processes: list[Process] = []

    def start(config: Path = file, kubeconfig: Path | None = None) -> Process:
        name = tmp_path / f"log-{len(processes)}"
        processes.append(Process(config, kubeconfig or server.kubeconfig(tmp_path / "kubeconfig"), name))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def without(resource: str, verb: str) -> ApiServer:
    rules = [rule for rule in RULES if rule.resource != resource or verb not in rule.verbs]
    return ApiServer(rules=rules)


def test_what_is_missing_at_the_start_is_told_by_status_and_message(
    start: Start, tmp_path: Path, scraper: Prometheus
) -> None:
    def config(name: str, **changes: Any) -> Path:
        given = {"prometheus": scraper.url, **changes}
        return written(tmp_path / name, prometheus=given.pop("prometheus"), changes=given)

    well = config("well")
    taken = socket.create_server(("", 0))
    no_crd = ApiServer(rules=list(RULES), kinds={})
    cases: list[tuple[Path, ApiServer | None, Exit, str]] = [
        (tmp_path / "nothing", None, Exit.CONFIG, "cannot be read"),
        (config("port", metrics_port=taken.getsockname()[1]), None, Exit.CONFIG, "in use"),
        (config("alone", prometheus=UNREACHABLE), None, Exit.NO_PROMETHEUS, "does not answer"),
        (well, without("rayservices", "get"), Exit.FORBIDDEN, 'cannot get resource "rayservices"'),
        (well, without("leases", "create"), Exit.FORBIDDEN, 'cannot create resource "leases"'),
        (well, without("events", "create"), Exit.FORBIDDEN, 'cannot create resource "events"'),
        (well, no_crd, Exit.NO_CRD, "there is no rayservices.ray.io: is KubeRay installed?"),
        (well, None, Exit.API_LOST, "refused"),
    ]
    started: list[tuple[Process, ApiServer | None, Exit, str]] = []
    for path, server, exit, words in cases:
        if server is None:
            kubeconfig = ApiServer().kubeconfig(tmp_path / "nowhere")  # port 0: nobody is there
        else:
            server.start()
            kubeconfig = server.kubeconfig(tmp_path / f"kubeconfig-{len(started)}")
        started.append((start(path, kubeconfig), server, exit, words))
    for process, server, exit, words in started:
        status = process.wait(60)
        assert (status, words in process.log) == (exit, True), process.log
        assert "Traceback" not in process.log
        assert f"CRITICAL {exit.name.lower()}: " in process.log
        if server is not None:
            server.stop()
    taken.close()


def test_it_needs_what_it_says_and_no_more(start: Start, server: ApiServer, operator: Operator) -> None:
    operator.rayservice("head")
    process = start()
    wait_until("it leads", process.leads, 30)
    wait_until("it has told", lambda: len(operator.events()) >= 2, 10)
    process.send(signal.SIGTERM)
    assert process.wait(10) == Exit.DONE
    assert {(verb, rule.resource) for rule in RULES for verb in rule.verbs} == set(server.used)
    said = (ROOT / "k8s" / "__init__.py").read_text()
    for rule in RULES:
        assert rule.resource in said
        assert rule.group in said


def test_until_there_is_a_rayservice_with_an_active_cluster_it_waits(
    start: Start, operator: Operator, server: ApiServer
) -> None:
    process = start()

    wait_until("it leads", process.leads, 30)
    wait_until("it waits", lambda: process.rounds("no_cluster") >= 2, 10)
    operator.rayservice(None)
    before = process.rounds("no_cluster")
    wait_until("it waits", lambda: process.rounds("no_cluster") >= before + 2, 10)
    operator.rayservice("nowhere")
    wait_until("it asks the head", lambda: process.rounds("unreachable") >= 1, 20)
    reasons = [event["reason"] for event in operator.events()]
    assert reasons == ["Leading", "NoActiveCluster", "ServeUnreachable"]
    unreachable = operator.events("ServeUnreachable")[0]
    assert unreachable["type"] == "Warning"
    assert "http://nowhere.speech.svc:8265" in unreachable["note"]
    assert unreachable["regarding"]["kind"] == "RayService"
    assert unreachable["regarding"]["uid"] == operator("get", RAY, "rayservices", "whisper")["metadata"]["uid"]
    assert httpx.get(f"{process.url()}/healthz").status_code == 200
    assert httpx.get(f"{process.url()}/else").status_code == 404


def test_without_the_api_server_leader_and_standby_end(
    start: Start, server: ApiServer, file: Path, tmp_path: Path
) -> None:
    silent, failing = ApiServer(rules=list(RULES)), ApiServer(rules=list(RULES))
    silent.start()
    failing.start()
    first = start()
    others = [start(file, each.kubeconfig(tmp_path / f"{each.port}")) for each in (silent, failing)]
    for process in (first, *others):
        wait_until("it leads", process.leads, 30)
    standby = start()
    wait_until("it waits", lambda: standby.rounds("standby") > 1, 30)
    assert not standby.leads()
    server.stop()
    silent.fall("silent")
    failing.fall("failing")
    for process in (first, standby, *others):
        assert process.wait(15) == Exit.API_LOST, process.log
        assert "CRITICAL api_lost: the API server has not answered for 4 s" in process.log
    for each in (silent, failing):
        each.stop()


def test_one_that_is_told_to_end_hands_over_at_once(start: Start, operator: Operator) -> None:
    first = start()
    wait_until("it leads", first.leads, 30)
    second = start()
    second.url()
    wait_until("it waits", lambda: second.rounds("standby") > 1, 30)
    first.send(signal.SIGTERM)
    assert first.wait(10) == Exit.DONE
    assert wait_until("the second leads", second.leads, 10) < 4


def test_who_loses_the_lease_ends(start: Start, operator: Operator) -> None:
    process = start()
    wait_until("it leads", process.leads, 30)
    operator.take_lease("another")
    assert process.wait(10) == Exit.LEADERSHIP_LOST
    assert "another controller holds the Lease" in process.log


def test_a_bad_file_changes_nothing_and_is_told(
    start: Start, file: Path, operator: Operator, scraper: Prometheus
) -> None:
    process = start()
    wait_until("it leads", process.leads, 30)
    assert process.metric("whisper_controller_config_valid") == 1
    good = file.read_text()
    file.write_text("tick_s: soon")
    wait_until("it is told", lambda: len(operator.events("ConfigRejected")) == 1, 10)
    assert "tick_s" in operator.events("ConfigRejected")[0]["note"]
    assert process.metric("whisper_controller_config_valid") == 0
    assert process.running
    file.write_text(good)
    wait_until("it is mended", lambda: process.metric("whisper_controller_config_valid") == 1, 10)
    written(file, prometheus=scraper.url, changes={"scaling": {"sm_utilization": 0.5}})
    wait_until("it is taken", lambda: len(operator.events("ConfigReloaded")) == 1, 10)
    assert len(operator.events("ConfigRejected")) == 1
