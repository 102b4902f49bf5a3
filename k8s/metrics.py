"""The controller's own metrics, and the port where they and its health are.

``docs/metrics.md`` explains them; a test compares it with what is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from serve_app.scaling.changes import Change, expected
from serve_app.scaling.readings import STAGES, Stage

OUTCOMES = (
    "ok",
    "standby",
    "no_signals",
    "no_cluster",
    "no_application",
    "unreachable",
    "unauthorized",
    "scaling_off",
    "bad_answer",
    "api_unreachable",
    "failed",
)
"""Of a tick. With no_signals Prometheus did not answer, and the policy holds; all after it are of Serve, of the API
server, or of the controller itself."""


class Metrics:
    """registry: all of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.decisions = Counter(
            "whisper_scaling_decisions",
            "What the autoscaling policy decided (up, down, hold), and why.",
            ["stage", "direction", "reason"],
            registry=self.registry,
        )
        self.wanted = Gauge(
            "whisper_scaling_wanted_replicas",
            "Replicas that the policy asks for.",
            ["stage"],
            registry=self.registry,
        )
        self.current = Gauge(
            "whisper_scaling_current_replicas", "Replicas that run.", ["stage"], registry=self.registry
        )
        self.leader = Gauge(
            "whisper_controller_leader", "Whether this controller holds the Lease.", registry=self.registry
        )
        self.config_valid = Gauge(
            "whisper_controller_config_valid",
            "Whether the configuration file, as it is now, is in force.",
            registry=self.registry,
        )
        self.ticks = Counter(
            "whisper_controller_ticks", "Rounds of looking and deciding.", ["outcome"], registry=self.registry
        )
        self.signal_age = Gauge(
            "whisper_controller_signal_age_seconds",
            "Since the newest reading of a replica of the stage that runs.",
            ["stage"],
            registry=self.registry,
        )
        self.requests = Counter(
            "whisper_controller_scale_requests",
            "What Serve was asked for.",
            ["stage", "outcome"],
            registry=self.registry,
        )
        self.last_tick = Gauge(
            "whisper_controller_last_tick_timestamp_seconds", "When the last round ended.", registry=self.registry
        )
        # a counter that appears with its first event hides that event from rate()
        for stage, direction, reason in expected():
            self.decisions.labels(stage, direction, reason)
        for outcome in OUTCOMES:
            self.ticks.labels(outcome)
        for stage in STAGES:
            self.requests.labels(stage, "done")

    def decided(self, change: Change) -> None:
        self.decisions.labels(change.stage, change.direction, change.reason).inc()
        self.wanted.labels(change.stage).set(change.target)
        self.current.labels(change.stage).set(change.ready)

    def ages(self, ages: Mapping[Stage, float]) -> None:
        for stage, seconds in ages.items():
            self.signal_age.labels(stage).set(seconds)


class Health:
    """Does the controller still go round? silent_s: how long a round may take."""

    def __init__(self, silent_s: float, clock: Callable[[], float] = time.monotonic):
        self._silent_s, self._now = silent_s, clock
        self._beat_at = clock()

    def beat(self) -> None:
        self._beat_at = self._now()

    @property
    def alive(self) -> bool:
        return self._now() - self._beat_at <= self._silent_s


class Port:
    """Serves /metrics and /healthz on a thread until it is closed. port: 0 takes any free one. Raises OSError where it
    cannot be had."""

    def __init__(self, *, port: int, metrics: Metrics, health: Health):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry))
                    case "/healthz" if health.alive:
                        self._answer(200, "text/plain", b"ok\n")
                    case "/healthz":
                        self._answer(503, "text/plain", b"the controller does not go round\n")
                    case _:
                        self._answer(404, "text/plain", b"/metrics or /healthz\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: a scrape a second is no news."""

        self._server = ThreadingHTTPServer(("", port), Handler)
        self._server.daemon_threads = True
        self.number: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
