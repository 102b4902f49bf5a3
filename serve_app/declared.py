"""Deploying the application with an autoscaling policy for all of it.

Serve takes such a policy with an application that is declared (``ServeDeploySchema``, as in ``serve deploy``), not with
one that is run (``serve.run``). A declaration names a function that builds the application, and its arguments; Serve
writes both to its log and shows them on the dashboard. Settings hold API keys, so the argument is only the name under
which they lie in the cluster's own store.
"""

from __future__ import annotations

import contextlib
import pickle
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeApplicationSchema, ServeDeploySchema

from serve_app.app import build, filled
from serve_app.scaling.mount import ServePolicy
from serve_app.scaling.readings import STAGES
from serve_app.settings import Settings, known

NAMESPACE = "whisper-serve"
POLL_S = 0.1


@contextlib.contextmanager
def declared(settings: Settings) -> Iterator[None]:
    """Deploys the application beside what else runs in the cluster, and waits until it is up; its settings stay in the
    cluster's store until the context ends. Raises RuntimeError where it cannot be deployed."""
    settings = filled(settings)
    key = uuid.uuid4().hex  # another one each time: Serve builds anew where the arguments have changed
    _internal_kv_put(key, pickle.dumps(settings), namespace=NAMESPACE)
    try:
        client = _get_global_client()
        assert client is not None  # Serve has been started
        others = client.get_serve_details()
        # what is declared and missing in a new declaration ends
        kept = [
            application["deployed_app_config"]
            for name, application in others["applications"].items()
            if application.get("deployed_app_config") and name != settings.app_name
        ]
        declaration = ServeDeploySchema(
            applications=[*kept, _application(settings, key)], target_capacity=others.get("target_capacity")
        )
        client.deploy_apps(declaration)
        _wait_until_up(settings.app_name)
        client.wait_for_proxies_serving()
        yield
    finally:
        _internal_kv_del(key, namespace=NAMESPACE)


def application(arguments: dict[str, str]) -> serve.Application:
    """For Serve, which calls it in a process of the cluster. Raises LookupError where the settings have gone."""
    stored = _internal_kv_get(arguments["settings"], namespace=NAMESPACE)
    if stored is None:
        raise LookupError("the settings have gone: whoever deployed this application has ended")
    settings: Settings = pickle.loads(stored)  # noqa: S301  # ``declared`` wrote it
    return build(settings)


def _application(settings: Settings, key: str) -> ServeApplicationSchema:
    gpus = {stage: known(getattr(settings, stage).num_gpus) for stage in STAGES}
    policy: dict[str, Any] = {
        "policy_function": f"{ServePolicy.__module__}:{ServePolicy.__qualname__}",
        "policy_kwargs": {"scaling": settings.scaling.model_dump(mode="json"), "gpus": gpus},
    }
    return ServeApplicationSchema(
        name=settings.app_name,
        route_prefix="/",
        import_path=f"{__name__}:{application.__name__}",
        args={"settings": key},
        autoscaling_policy=policy,
    )


def _wait_until_up(name: str) -> None:
    while True:
        found = serve.status().applications.get(name)
        if found is None or found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING):
            raise RuntimeError(f"the application could not be deployed: {found.message if found else 'it has gone'}")
        if found.status == ApplicationStatus.RUNNING:
            return
        time.sleep(POLL_S)
