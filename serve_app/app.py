"""The whole application, on one page: an API deployment in front of three stages."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serve_app.api.routes import build_api
from serve_app.batching.router import StageRouter
from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript
from serve_app.scaling.policy import PODS
from serve_app.scaling.readings import API, STAGES, Stage, encode
from serve_app.service import Transcriber
from serve_app.settings import PlacedSettings, Settings, StageSettings, known
from serve_app.stages.decoder import DecoderStage
from serve_app.stages.encoder import EncoderStage
from serve_app.stages.features import FeaturesStage
from serve_app.stages.replica import StageReplica
from serve_app.stages.threads import use_threads

HEALTH_CHECK_S = 1.0
"""A dead replica is replaced once a health check has failed: the shorter the period, the shorter the gap."""

DRAIN_S = 60.0
"""A replica that is told to stop has this long to finish what it holds."""

REPORT_S = 0.5
"""How often an autoscaled replica sends its reading to Serve's controller."""

WORKER_ENV = {
    # OpenMP threads that wait for work sleep instead of spinning: stages share the cores
    "OMP_WAIT_POLICY": "PASSIVE",
}

SERVE_ENV = {
    # Nothing here blocks an event loop, so that Serve's own will do: on loops of their own, in other threads, the code
    # of a deployment and the handles in it cost the decoder three times the CPU time for a window, and its engine's
    # thread waits for the interpreter behind all of them.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Of Ray Serve, in the replicas' processes."""


@serve.ingress()
class Api:
    """HTTP, and the methods that Python callers reach through a handle."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        features: DeploymentHandle[Any],
        encoder: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
    ):
        self._settings = settings
        use_threads(1)  # voice activity runs on several threads, one recording each
        model = await decoder.options(method_name="describe").remote()
        stages = {"features": features, "encoder": encoder, "decoder": decoder}
        self._transcriber = Transcriber(settings, stages, model)
        await self._transcriber.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy numbers the responses itself
        return build_api(self._transcriber, self._settings, set_request_id=False)

    async def transcribe(
        self, audio: bytes | np.ndarray[Any, Any], options: TranscribeOptions, sample_rate: int = 16_000
    ) -> Transcript:
        """For Python callers (``serve_app.client``): a file's bytes, or samples at ``sample_rate``."""
        return await self._transcriber.transcribe(audio, options, sample_rate=sample_rate)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it where the deployment is autoscaled (``scaling.readings.CallerReading``)."""
        return encode(self._transcriber.reading())

    async def __del__(self) -> None:
        if hasattr(self, "_transcriber"):  # it may be stopped before the stages were up
            await self._transcriber.close()


def build(settings: Settings) -> serve.Application:
    """The application's graph: Api → features, encoder, decoder."""
    settings = filled(settings)
    features = _stage(FeaturesStage, "features", settings, settings.features).bind(settings)
    encoder = _stage(EncoderStage, "encoder", settings, settings.encoder).bind(settings)
    decoder = _stage(DecoderStage, "decoder", settings, settings.decoder).bind(settings)
    api = serve.deployment(
        name=API,
        **_api_replicas(settings),
        # the transcriber's own bound answers first, with advice when to come back
        max_ongoing_requests=2 * settings.request.max_active + 64,
        max_queued_requests=settings.request.max_active,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        **_spread(settings.http),
        ray_actor_options={
            "num_cpus": 0,
            "resources": settings.http.resources,
            "runtime_env": {"env_vars": SERVE_ENV},
        },
    )(Api)
    application: serve.Application = api.bind(settings, features, encoder, decoder)
    return application


def filled(settings: Settings) -> Settings:
    """With the defaults that depend on where the stages will run."""
    return settings.filled(on_gpu=_on_gpu(settings))


def _on_gpu(settings: Settings) -> bool:
    """Will the stages run on GPUs? Where the settings leave it open, on those that the cluster has."""
    if settings.model.device != "auto":
        return settings.model.device == "cuda"
    return bool(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else torch.cuda.is_available()


def _stage(replica: type[StageReplica], name: Stage, settings: Settings, stage: StageSettings) -> serve.Deployment:
    return serve.deployment(
        name=name,
        **_stage_replicas(settings, name, stage),
        # calls carry several windows, and windows are what is bounded (StageSettings.max_queued_windows)
        max_ongoing_requests=100_000,
        request_router_config=RequestRouterConfig(
            request_router_class=StageRouter,  # type: ignore[arg-type]  # a class is right, says Serve's own docstring
        ),
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=LoggingConfig(enable_access_log=False),  # a request is one line, the API's
        **_spread(stage),
        ray_actor_options={
            "num_cpus": stage.num_cpus,
            "num_gpus": stage.num_gpus,
            "resources": stage.resources,
            "runtime_env": {"env_vars": WORKER_ENV | SERVE_ENV},
        },
    )(replica)


def _stage_replicas(settings: Settings, name: Stage, stage: StageSettings) -> dict[str, Any]:
    """Options that say how many: as many as are set, or what the policy says within its limits."""
    scaling = settings.scaling
    if not scaling.enabled:
        return {"num_replicas": stage.replicas}
    if scaling.topology == "colocated":
        limits = scaling.limits(PODS)
        start = max(getattr(settings, each).replicas for each in STAGES)
    else:
        limits = scaling.limits(name)
        start = stage.replicas
    start = min(max(start, limits.min_replicas), limits.max_replicas)
    return {"autoscaling_config": _scaled(limits.min_replicas, start, limits.max_replicas)}


def _spread(deployment: PlacedSettings) -> dict[str, Any]:
    most = deployment.max_replicas_per_node
    return {} if most is None else {"max_replicas_per_node": most}


def _api_replicas(settings: Settings) -> dict[str, Any]:
    """As many as are set; Serve asks autoscaled deployments alone for readings, so with a policy it is one of them."""
    count = known(settings.http.replicas)
    return {"autoscaling_config": _scaled(count, count, count)} if settings.scaling.enabled else {"num_replicas": count}


def _scaled(least: int, start: int, most: int) -> AutoscalingConfig:
    """The policy has its own hold times, so Serve adds no delay."""
    with warnings.catch_warnings():
        # NOTES: of Ray 2.60. The environment variables that are to replace ``metrics_interval_s`` are read by nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=least,
            initial_replicas=start,
            max_replicas=most,
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            metrics_interval_s=REPORT_S,
            look_back_period_s=4 * REPORT_S,  # a report carries all of it; only the newest reading counts
        )
