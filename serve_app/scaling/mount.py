"""The policy inside Ray Serve: what replicas report becomes signals, a decision becomes replica counts.

Serve's controller calls an application's policy ten times a second, between everything else it does, so the policy is
asked twice a second only and nothing here waits for anything but a line to be appended to the decision log.

NOTES: Serve pickles this module by value and the rest of the project by name, so what must be one object in a process
(metrics, types that are compared) lives in other modules. An error that left ``__call__`` would stop Serve from looking
after all its applications: it is logged, and replicas stay as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingContext

from serve_app import metrics
from serve_app.scaling.changes import changes, expected
from serve_app.scaling.config import ScalingSettings
from serve_app.scaling.decider import Decider
from serve_app.scaling.load import Signals, stage_signals
from serve_app.scaling.policy import Decision
from serve_app.scaling.readings import API, STAGES, CallerReading, Reading, ReplicaReading, Stage, decode

logger = logging.getLogger("ray.serve")  # the controller writes this one to its log file

PERIOD_S = 0.5
"""Twice as often as readings change: a change is answered that much sooner."""


class ServePolicy:
    """For Serve: made once for an application, then called with its deployments.

    scaling: ``ScalingSettings`` as JSON. gpus: what a replica of each stage holds of a GPU.
    """

    def __init__(self, scaling: Mapping[str, Any], gpus: Mapping[Stage, float]):
        self._decider = Decider(ScalingSettings.model_validate(scaling))
        self._gpus = dict(gpus)
        self._targets: dict[Stage, int] = {}
        self._asked_at = -PERIOD_S
        self._told: set[str] = set()
        for stage, direction, reason in expected():
            metrics.SCALING_DECISIONS.start(stage=stage, direction=direction, reason=reason)

    def __call__(
        self, contexts: Mapping[DeploymentID, AutoscalingContext]
    ) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
        """Replica counts of the stages; Serve leaves the deployments that are not named as they are."""
        by_name = {deployment.name: context for deployment, context in contexts.items()}
        # while the application is being deployed some stages are missing
        if time.monotonic() - self._asked_at >= PERIOD_S and all(stage in by_name for stage in STAGES):
            self._asked_at = time.monotonic()
            try:
                self._ask(by_name, time.time())
            except Exception as error:
                if str(error) not in self._told:
                    self._told.add(str(error))
                    logger.exception("autoscaling: replicas stay as they are")
        return {id: self._targets[id.name] for id in contexts if id.name in self._targets}, {}

    def _ask(self, contexts: Mapping[str, AutoscalingContext], now: float) -> None:
        signals = signals_of(contexts, self._gpus)
        decision = self._decider.decide(signals, now)
        self._targets = dict(decision.targets)
        _report(signals, decision)


def signals_of(contexts: Mapping[str, AutoscalingContext], gpus: Mapping[Stage, float]) -> Signals:
    """contexts: by the deployment's name."""
    stages = {}
    for stage in STAGES:
        context = contexts[stage]
        stages[stage] = stage_signals(
            target=context.target_num_replicas,
            ready=context.current_num_replicas,
            gpus=gpus[stage],
            readings=_readings(ReplicaReading, context),
        )
    return Signals(stages, _readings(CallerReading, contexts[API]) if API in contexts else {})


def _readings(kind: type[Reading], context: AutoscalingContext) -> dict[str, Reading]:
    """The newest reading of each running replica that has sent one, by its id."""
    reports: dict[str, dict[str, float]] = {}
    for name, replicas in (context.raw_metrics or {}).items():
        for replica, series in replicas.items():
            if series:
                reports.setdefault(replica.unique_id, {})[name] = series[-1].value
    readings: dict[str, Reading] = {}
    for replica_id, values in reports.items():
        # a replica of another version is one that has not been heard of: the policy knows what that means
        with suppress(ValueError):
            readings[replica_id] = decode(kind, values)
    return readings


def _report(signals: Signals, decision: Decision) -> None:
    """To the metrics, and changes to the controller's log."""
    for change in changes(signals, decision):
        metrics.SCALING_DECISIONS.add(stage=change.stage, direction=change.direction, reason=change.reason)
        metrics.SCALING_WANTED.set(change.target, stage=change.stage)
        metrics.SCALING_CURRENT.set(change.ready, stage=change.stage)
        if change.direction != "hold":
            logger.info(str(change))
