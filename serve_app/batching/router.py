"""Sends a stage call to the replica that its caller names, and tells callers which replicas live.

Serve's own router spreads *calls*; the batching handle counts *windows* against each replica's credit, and speaks of
windows to the replica that holds them (``cancel``). So the handle chooses, and this router obeys. It runs inside the
caller's process, on an event loop that may be another thread's.

NOTES: Serve pickles this module whole to send the class to callers. What it shares with the process that it then runs
in lives in ``batching.live``.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.batching import live

REPLICA_ARGUMENT = "replica"
"""Keyword argument of every stage method: the replica meant, or None for any."""


class StageRouter(RequestRouter):
    """Routes to the replica named by the call; to any other only where that one is gone."""

    def _publish(self) -> None:
        key = live.deployment_key(self._deployment_id.app_name, self._deployment_id.name)
        live.LIVE_REPLICAS.update(key, frozenset(replica.unique_id for replica in self.curr_replicas))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted: Any = pending_request.kwargs.get(REPLICA_ARGUMENT) if pending_request is not None else None
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named or candidate_replicas]
