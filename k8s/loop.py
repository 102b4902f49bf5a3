"""The controller's round: look, decide, ask Serve for what differs.

Every round starts from what is there, and asking for the same number again changes nothing. So a round that fails is
made up for by the next one, and nothing has to be noticed at the moment it happens: Serve's configuration deployed
anew, a new active cluster, a restart of either side all show as a number that differs from the one wanted.

What was last asked for is the controller's own, not Serve's: a new cluster begins with the sizes of its configuration,
and taking those for decisions would let the replicas go that the load needs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from k8s.cluster import ActiveCluster, ApiUnreachable, Cluster
from k8s.config import ConfigFile
from k8s.exits import Ending
from k8s.kept import Kept, pack, unpack
from k8s.leader import Elector
from k8s.metrics import Health, Metrics
from k8s.prometheus import Prometheus, PrometheusError, Sample
from k8s.serve import ON, ScalingOff, ServeApi, ServeError, ServeStatus
from k8s.signals import application_query, dcgm_query, rebuilt
from serve_app.scaling.changes import Change, changes
from serve_app.scaling.decider import Decider
from serve_app.scaling.load import Signals
from serve_app.scaling.policy import Decision, State, carried
from serve_app.scaling.readings import API, STAGES, Stage

logger = logging.getLogger(__name__)

KEEP_S = 60.0
"""How often the policy's state is left for the next leader; what is asked for is at once."""
KEPT_TARGETS_S = 2 * KEEP_S
"""After a longer time without a leader Serve's numbers are more likely right than the last leader's."""

WARNINGS = {
    "no_signals": "PrometheusUnreachable",
    "no_cluster": "NoActiveCluster",
    "no_application": "NoApplication",
    "unreachable": "ServeUnreachable",
    "unauthorized": "ServeUnauthorized",
    "scaling_off": "ExternalScalingOff",
    "bad_answer": "ServeUnintelligible",
    "failed": "RoundFailed",
}
"""Outcome of a round → reason of the Event about it."""


class Controller:
    """Goes round until it is told to stop. Acts only while the elector leads."""

    def __init__(self, *, config: ConfigFile, cluster: Cluster, elector: Elector, metrics: Metrics, health: Health):
        self._config, self._cluster, self._elector = config, cluster, elector
        self._metrics, self._health = metrics, health
        self._prometheus = Prometheus(url=config.settings.prometheus_url)
        self._serve: ServeApi | None = None
        self._decider: Decider | None = None  # from when it leads
        self._active: ActiveCluster | None = None
        self._wanted: dict[Stage, int] = {}  # what Serve was last asked for
        self._signals: Signals | None = None
        self._heard_at: dict[Stage, float] = {}
        self._kept_at = 0.0
        self._kept_targets: dict[Stage, int] = {}
        self._told: dict[str, object] = {}
        metrics.config_valid.set(1)
        metrics.leader.set(0)

    def run(self, stop: threading.Event) -> None:
        """Raises Ending where the controller cannot go on."""
        while not stop.is_set():
            began = time.monotonic()
            outcome, why = self._round()
            self._metrics.ticks.labels(outcome).inc()
            self._metrics.last_tick.set_to_current_time()
            self._health.beat()
            self._tell_outcome(outcome, why)
            stop.wait(max(0.0, self._config.settings.tick_s - (time.monotonic() - began)))

    def _round(self) -> tuple[str, str]:
        """Its outcome, and why it is not ok."""
        try:
            self._reload()
            if not self._elector.leading:
                return "standby", ""
            return self._lead(time.time())
        except Ending:
            raise
        except ServeError as error:
            return error.outcome, str(error)
        except ApiUnreachable as error:
            return "api_unreachable", str(error)
        except Exception as error:
            if self._is_news("exception", str(error)):
                logger.exception("a round failed: replicas stay as they are")
            return "failed", repr(error)

    def _lead(self, now: float) -> tuple[str, str]:
        if self._decider is None:
            self._decider = self._take_over(now)
        self._show_ages(now)
        active = self._cluster.active()
        if active is None:
            return "no_cluster", "the RayService has no active cluster"
        status = self._serve_of(active).status((*STAGES, API))
        application, dcgm, missing = self._samples()
        settings = self._config.settings
        targets = {stage: status.deployments[stage].target for stage in STAGES}
        if not settings.dry_run:
            targets |= self._wanted
        self._signals = signals = rebuilt(
            application=application,
            dcgm=dcgm,
            serve=status,
            targets=targets,
            gpus=settings.gpus,
            before=self._signals,
        )
        decision = self._decider.decide(signals, now)
        self._show(signals, decision, now)
        self._assert(status, changes(signals, decision))
        self._leave(now)
        return ("no_signals", missing) if missing else ("ok", "")

    def _samples(self) -> tuple[Sequence[Sample], Sequence[Sample] | None, str]:
        """The application's and DCGM's, and why there are none: without them the policy still sees Serve's side, and
        holds."""
        settings = self._config.settings
        dcgm: list[Sample] | None = None
        try:
            if settings.signals == "dcgm":
                dcgm = []
                dcgm = self._prometheus.query(dcgm_query(settings))
            return self._prometheus.query(application_query(settings)), dcgm, ""
        except PrometheusError as error:
            return [], dcgm, str(error)

    def _serve_of(self, active: ActiveCluster) -> ServeApi:
        if active != self._active:
            logger.info("the active cluster is %s", active.name)
            self._active = active
        settings = self._config.settings
        url = settings.dashboard(active.service)
        if self._serve is None or self._serve.url != url:
            if self._serve is not None:
                self._serve.close()
            self._serve = ServeApi(url=url, application=settings.application, token_file=settings.ray_token_file)
        return self._serve

    def _assert(self, status: ServeStatus, decided: Sequence[Change]) -> None:
        """Asks Serve for what it does not aim at yet. Raises ServeError."""
        differing = [change for change in decided if status.deployments[change.stage].target != change.target]
        if self._config.settings.dry_run:
            if self._is_news("dry run", [change.target for change in differing]):
                for change in differing:
                    logger.info("dry run, not asked for: %s", change)
            return
        if not status.external:
            raise ScalingOff(f"the application {self._config.settings.application} needs `{ON}` in its configuration")
        asked: list[Change] = []
        try:
            for change in decided:
                if change in differing:
                    self._scale(change.stage, change.target)
                    asked.append(change)
                self._wanted[change.stage] = change.target
        finally:
            self._tell_changes(status, asked)

    def _scale(self, stage: Stage, replicas: int) -> None:
        if not self._elector.leading:  # this round has taken too long
            raise ApiUnreachable("the Lease has not been renewed in time")
        assert self._serve is not None  # its status has been read
        try:
            self._serve.scale(stage, replicas)
        except ServeError as error:
            self._metrics.requests.labels(stage, error.outcome).inc()
            raise
        self._metrics.requests.labels(stage, "done").inc()

    def _reload(self) -> None:
        changed = self._config.reload()
        error = self._config.error
        self._metrics.config_valid.set(error is None)
        leads = self._decider is not None
        if self._is_news("config", error) and error is not None:
            logger.error("the configuration file is not taken, what was read before stays in force: %s", error)
            if leads:
                self._cluster.tell("ConfigRejected", error, warning=True)
        if not changed:
            return
        settings = self._config.settings
        logger.info("the configuration has changed")
        self._prometheus.close()
        self._prometheus = Prometheus(url=settings.prometheus_url)
        if self._serve is not None:
            self._serve.close()
            self._serve = None
        if self._decider is not None:
            self._decider.reconfigure(settings.scaling)
            self._cluster.tell("ConfigReloaded", "the configuration file has changed and is in force")

    # ---- between leaders ----

    def _take_over(self, now: float) -> Decider:
        """From what the leader before has left, as far as it still holds."""
        self._metrics.leader.set(1)
        self._heard_at = dict.fromkeys(STAGES, now)
        settings = self._config.settings
        state, found = State(), "from nothing"
        if self._elector.kept is not None:
            try:
                kept = unpack(self._elector.kept)
            except ValueError as error:
                logger.warning("what the leader before has left is not understood: %s", error)
            else:
                state = carried(kept.state, kept.config, settings.scaling)
                if now - kept.at <= KEPT_TARGETS_S:
                    self._wanted = {stage: kept.targets[stage] for stage in STAGES if stage in kept.targets}
                found = f"from what the leader before left {now - kept.at:.0f} s ago"
        logger.info("the policy starts %s", found)
        self._cluster.tell("Leading", f"this controller leads; the policy starts {found}")
        return Decider(settings.scaling, state)

    def _leave(self, now: float) -> None:
        """For the next leader."""
        assert self._decider is not None  # this one has decided
        if now - self._kept_at >= KEEP_S or self._wanted != self._kept_targets:
            self._kept_at, self._kept_targets = now, dict(self._wanted)
            kept = Kept(now, self._config.settings.scaling, self._kept_targets, self._decider.state)
            self._elector.keep(pack(kept))

    # ---- telling ----

    def _show(self, signals: Signals, decision: Decision, now: float) -> None:
        for change in changes(signals, decision):
            self._metrics.decided(change)
        for stage, found in signals.stages.items():
            newest = max((reading.at for reading in found.readings.values()), default=0.0)
            self._heard_at[stage] = max(self._heard_at[stage], newest)
        self._show_ages(now)
        stale = [name for name, unit in decision.units.items() if unit.reason == "stale"]
        if self._is_news("stale", stale):
            if stale:
                words = "; ".join(f"{name}: {decision.units[name].words}" for name in stale)
                self._tell("SignalsStale", f"replicas stay as they are: {words}", warning=True)
            else:
                self._tell("SignalsFresh", "replicas have been heard of again")

    def _show_ages(self, now: float) -> None:
        self._metrics.ages({stage: max(0.0, now - at) for stage, at in self._heard_at.items()})

    def _tell_changes(self, status: ServeStatus, asked: Sequence[Change]) -> None:
        """One Event for each reason: pods have all stages, and one reason for all of them."""
        assert self._active is not None  # it was asked
        by_event: dict[tuple[str, str], list[str]] = {}
        for change in asked:
            had = status.deployments[change.stage].target
            reason = {"up": "ScaledUp", "down": "ScaledDown", "hold": "Reasserted"}[change.direction]
            why = f"Serve aimed at another number in {self._active.name}"
            if change.direction != "hold":
                why = f"({change.reason}): {change.words}"
            by_event.setdefault((reason, why), []).append(f"{change.stage} {had} → {change.target}")
        for (reason, why), stages in by_event.items():
            self._tell(reason, f"{', '.join(stages)} {why}")

    def _tell_outcome(self, outcome: str, why: str) -> None:
        key = outcome if outcome in WARNINGS else None
        if outcome in ("standby", "api_unreachable") or not self._is_news("outcome", key):
            return
        if key is None:
            self._tell("Recovered", "the controller sees and asks again")
        else:
            self._tell(WARNINGS[outcome], why, warning=True)

    def _tell(self, reason: str, note: str, *, warning: bool = False) -> None:
        logger.log(logging.WARNING if warning else logging.INFO, "%s: %s", reason, note)
        self._cluster.tell(reason, note, warning=warning)

    def _is_news(self, topic: str, what: object) -> bool:
        """Has this changed since it was last asked? Nothing (None, no names) is no news at first."""
        before = self._told.get(topic)
        self._told[topic] = what
        return what != before if what or before else False
