"""docker-compose.yaml and what it mounts. No container engine runs here: the application, as it is set up there, and
Prometheus, with its configuration, run on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loadtest.dashboards.__main__ import FOLDER as DASHBOARDS
from loadtest.recording import send
from loadtest.server import serve_command, started
from serve_app.settings import CONFIG_FILE_VARIABLE, ENV_PREFIX, Settings
from tests.conftest import ROOT, free_port
from tests.prometheus import program, prometheus

COMPOSE = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "docker-compose.yaml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WHISPER = [SERVICES["whisper"], SERVICES["whisper-cpu"]]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Path in the container → path here, of what comes from this repository; checks that it is read-only."""
    found = {}
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        if source.startswith("./"):
            assert mode == ["ro"], volume
            found[target] = source
        else:
            assert source in COMPOSE["volumes"], volume
    return found


def published(service: dict[str, Any]) -> dict[int, int]:
    """Port of the host → port of the container."""
    return {int(port.split(":")[-2]): int(port.split(":")[-1]) for port in service["ports"]}


def settings(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of the application in that service."""
    flag, path = service["command"][1:]
    assert flag == "--config"
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(ROOT / mounts(service)[path]))
    for name, value in service["environment"].items():
        if name.startswith(ENV_PREFIX):
            monkeypatch.setenv(name, value)
    return Settings()


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_what_is_mounted_is_there(service: dict[str, Any]) -> None:
    for source in mounts(service).values():
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_a_service_has_no_more_rights_than_it_needs(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("service", WHISPER)
def test_ports_and_paths_are_those_of_the_settings(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(service, monkeypatch)
    assert chosen.http.port in published(service).values()
    assert chosen.metrics.port not in published(service).values()  # for Prometheus alone
    (job,) = [job for job in scrapes() if job["job_name"] == "whisper"]
    assert job["static_configs"] == [{"targets": [f"whisper:{chosen.metrics.port}"]}]
    assert "whisper" in service["networks"]["default"]["aliases"]
    shm = int(service["shm_size"].removesuffix("gb")) * 2**30
    assert int(service["environment"]["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"]) < shm
    for argument in service["build"]["args"]:
        assert f"ARG {argument}=" in DOCKERFILE


def test_each_profile_has_one_application_and_the_gpus_are_reserved() -> None:
    assert [service["profiles"] for service in WHISPER] == [["gpu"], ["cpu"]]
    assert [service["environment"]["WHISPER_SERVE_MODEL__DEVICE"] for service in WHISPER] == ["cuda", "cpu"]
    (device,) = SERVICES["whisper"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["whisper-cpu"]


def scrapes() -> list[dict[str, Any]]:
    config = yaml.safe_load((ROOT / "compose" / "prometheus.yaml").read_text())
    found: list[dict[str, Any]] = config["scrape_configs"]
    return found


def test_prometheus_takes_its_configuration_with_the_rules(tmp_path: Path) -> None:
    files = mounts(SERVICES["prometheus"])
    (flag,) = [each for each in SERVICES["prometheus"]["command"] if each.startswith("--config.file=")]
    text = (ROOT / files[flag.partition("=")[2]]).read_text()
    shutil.copytree(ROOT / files["/etc/prometheus/rules"], tmp_path / "rules")
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus/rules", str(tmp_path / "rules")))
    checked = subprocess.run(
        [program("promtool"), "check", "config", "--lint=all", "--lint-fatal", str(tmp_path / "prometheus.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 rule files found" in checked.stdout


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    grafana, files = SERVICES["grafana"], mounts(SERVICES["grafana"])
    read = {
        kind: yaml.safe_load((ROOT / files[f"/etc/grafana/provisioning/{kind}/whisper-serve.yaml"]).read_text())
        for kind in ("datasources", "dashboards")
    }
    (source,) = read["datasources"]["datasources"]
    (port,) = published(SERVICES["prometheus"]).values()
    assert (source["type"], source["url"]) == ("prometheus", f"http://prometheus:{port}")
    (provider,) = read["dashboards"]["providers"]
    folder = provider["options"]["path"]
    assert (ROOT / files[folder]).resolve() == DASHBOARDS
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DASHBOARDS / Path(home).relative_to(folder)).is_file()


def test_the_application_runs_as_it_is_set_up_and_prometheus_finds_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = SERVICES["whisper-cpu"]
    port, metrics_port = free_port(), free_port()
    for name, value in service["environment"].items():
        if name not in ("HOME", "XDG_CACHE_HOME"):  # folders of the container
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WHISPER_SERVE_METRICS__PORT", str(metrics_port))
    monkeypatch.setenv("WHISPER_SERVE_HTTP__PORT", str(port))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # sockets' paths are short
    flag, path = service["command"][1:]
    command = [*serve_command(), flag, str(ROOT / mounts(service)[path])]
    with started(command, f"http://127.0.0.1:{port}") as server:
        assert send(server.url, seconds=0.1, clients=1) == 1
        with prometheus(tmp_path, [f"127.0.0.1:{metrics_port}"]) as scraper:
            deadline = time.monotonic() + 30
            while scraper.value('sum(ray_whisper_requests_total{outcome="done"})') != 1:
                assert time.monotonic() < deadline, httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text[:2000]
                time.sleep(0.5)
            replicas = scraper.value("count(ray_whisper_requests_active)")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGTERM)  # as `docker compose stop` does
        ended = os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
    assert replicas == yaml.safe_load((ROOT / "compose" / "settings.yaml").read_text())["http"]["replicas"]


def test_a_metrics_port_for_a_cluster_that_runs_already_is_refused(ray_cluster: int) -> None:
    from serve_app.running import running

    with pytest.raises(RuntimeError, match=r"metrics\.port"), running(Settings(metrics={"port": 8080})):
        pass
    assert "RAY_ADDRESS" not in os.environ
