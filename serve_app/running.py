"""Starting the application on this machine, or on the Ray cluster that this machine belongs to."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from serve_app.app import WORKER_ENV, build
from serve_app.declared import declared
from serve_app.settings import HttpSettings, Settings


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Runs the application until the context ends; gives its URL when it is ready.

    In the cluster that this process has joined, or in the one named by ``RAY_ADDRESS``, it deploys the application and
    deletes it at the end; else it starts a cluster of its own, which ends with it. Raises RuntimeError where a cluster
    that runs already is not as the settings say.
    """
    address = os.environ.get("RAY_ADDRESS")
    metrics_port = settings.metrics.port
    if metrics_port is not None and (address or ray.is_initialized()):
        raise RuntimeError(
            f"metrics.port is {metrics_port}, but Ray runs already: its nodes have the ports that `ray start "
            f"--metrics-export-port` gave them"
        )
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            os.environ.update(WORKER_ENV)  # the workers that Ray starts ahead inherit it
            dashboard = None if address else False
            ray.init(
                address=address,
                include_dashboard=dashboard,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _metrics_export_port=metrics_port,
            )
            stack.callback(ray.shutdown)
            if not address:
                stack.callback(serve.shutdown)
        serve.start(http_options=HTTPOptions(host=settings.http.host, port=settings.http.port))
        _check_address(settings.http)
        stack.callback(serve.delete, settings.app_name)
        if settings.scaling.enabled:
            stack.enter_context(declared(settings))
        else:
            serve.run(build(settings), name=settings.app_name, route_prefix="/")
        yield f"http://{settings.http.host}:{settings.http.port}"


def _check_address(http: HttpSettings) -> None:
    """Serve listens once in a cluster: where it runs already, it keeps its address without a word.

    Raises RuntimeError where that is another than the settings'.
    """
    client = _get_global_client()
    assert client is not None  # serve.start has just made it
    listening = client.http_config
    if (listening.host, listening.port) != (http.host, http.port):
        raise RuntimeError(
            f"Ray Serve already runs in this cluster and listens on {listening.host}:{listening.port}: "
            f"set http.host and http.port to that, or stop it with `serve shutdown`"
        )
