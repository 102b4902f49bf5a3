"""An application of the product's shape without its work: three stages on each GPU node, and an API."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.scaling.readings import API, STAGES
from tests.k8s.raycluster import GPU_NODE

SHARES = {"features": 0.1, "encoder": 0.4, "decoder": 0.5}


class Stage:
    async def __call__(self) -> str:
        return "done"


class Front:
    def __init__(self, *stages: DeploymentHandle[Any]):
        self._stages = stages


def application(args: dict[str, Any]) -> serve.Application:
    stages = [
        serve.deployment(
            name=stage,
            num_replicas=args["replicas"],
            max_replicas_per_node=1,
            health_check_period_s=1,
            graceful_shutdown_timeout_s=1,
            ray_actor_options={"num_cpus": 0, "num_gpus": SHARES[stage], "resources": {GPU_NODE: 0.01}},
        )(Stage).bind()
        for stage in STAGES
    ]
    front: serve.Application = serve.deployment(name=API, ray_actor_options={"num_cpus": 0})(Front).bind(*stages)
    return front


def declaration(replicas: int = 1, version: int = 0, *, external: bool = True) -> dict[str, Any]:
    """For Serve. version: another one is another configuration, deployed anew. external: are its numbers for others to
    say?"""
    return {
        "name": "pods",
        "route_prefix": "/pods",
        "import_path": f"{__name__}:application",
        "args": {"replicas": replicas, "version": version},
        "external_scaler_enabled": external,
    }
