"""Which replicas of the stages live, as this process last heard: where router and batching handle meet."""

from __future__ import annotations

import threading
from collections.abc import Callable


class LiveReplicas:
    """The replicas of each deployment as this process last heard of them. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[str, frozenset[str]] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}

    def of(self, deployment: str) -> frozenset[str]:
        return self._replicas.get(deployment, frozenset())

    def listen(self, deployment: str, listener: Callable[[], None]) -> None:
        """``listener`` is called, on some thread, whenever the deployment's replicas change."""
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)

    def update(self, deployment: str, replicas: frozenset[str]) -> None:
        with self._lock:
            if self._replicas.get(deployment) == replicas:
                return
            self._replicas[deployment] = replicas
            listeners = list(self._listeners.get(deployment, ()))
        for listener in listeners:
            listener()


LIVE_REPLICAS = LiveReplicas()


def deployment_key(app: str, deployment: str) -> str:
    return f"{app}#{deployment}"
