"""``python -m k8s --config FILE``: runs the controller until it is told to end."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
import uuid
from pathlib import Path

from kubernetes.client.exceptions import ApiException

import k8s
from k8s.cluster import ApiUnreachable, Cluster, connect
from k8s.config import ConfigError, ConfigFile, ControllerSettings
from k8s.exits import Ending, Exit, end_now
from k8s.leader import Elector
from k8s.loop import Controller
from k8s.metrics import Health, Metrics, Port
from k8s.prometheus import Prometheus, PrometheusError
from k8s.signals import application_query, dcgm_query

logger = logging.getLogger("k8s")

SILENT_S = 30.0
"""All timeouts of a round together are shorter."""


def main() -> int:
    assert k8s.__doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m k8s", description=k8s.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the controller's file, YAML")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    try:
        _run(options.config)
    except Ending as ending:
        logger.critical("%s: %s", ending.exit.name.lower(), ending)
        return ending.exit
    return Exit.DONE


def _run(path: Path) -> None:
    try:
        config = ConfigFile(path)
    except ConfigError as error:
        raise Ending(Exit.CONFIG, f"{path}: {error}") from None
    settings = config.settings
    metrics, health = Metrics(), Health(SILENT_S + settings.tick_s)
    try:
        port = Port(port=settings.metrics_port, metrics=metrics, health=health)
    except OSError as error:
        raise Ending(Exit.CONFIG, f"metrics_port {settings.metrics_port}: {error}") from None
    logger.info("metrics and health are on port %s", port.number)
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    api = connect()
    cluster = Cluster(api=api, namespace=settings.namespace, rayservice=settings.rayservice, identity=identity)
    elector = Elector(api=api, namespace=settings.namespace, lease=settings.lease, identity=identity, ended=end_now)
    _check_prometheus(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        cluster.check()
        elector.start()
    except (ApiUnreachable, ApiException) as error:
        raise Ending(Exit.API_LOST, str(error)) from None
    try:
        Controller(config=config, cluster=cluster, elector=elector, metrics=metrics, health=health).run(stop)
    finally:
        elector.stop()
        port.close()


def _check_prometheus(settings: ControllerSettings) -> None:
    """A wrong URL or selector should not look like a quiet night. Raises Ending."""
    prometheus = Prometheus(url=settings.prometheus_url)
    try:
        prometheus.query(application_query(settings))
        if settings.signals == "dcgm":
            prometheus.query(dcgm_query(settings))
    except PrometheusError as error:
        raise Ending(Exit.NO_PROMETHEUS, str(error)) from None
    finally:
        prometheus.close()


if __name__ == "__main__":
    raise SystemExit(main())
