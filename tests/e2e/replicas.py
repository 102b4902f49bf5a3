"""Finding the application's replicas, to kill them and to look into them."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from serve_app.stages.replica import Occupancy


def pids(deployment: str, app: str = "whisper") -> list[int]:
    """Processes of a deployment's replicas on this machine, by the title that Ray gives them."""
    title = f"ray::ServeReplica:{app}:{deployment}"
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if command.startswith(title):
                found.append(int(process.name))
    return found


def occupancy(deployment: str, app: str = "whisper") -> Occupancy:
    """What all replicas of a stage hold together."""
    handle = serve.get_deployment_handle(deployment, app)
    each: list[Occupancy] = handle.broadcast("occupancy").results(timeout_s=20)
    return Occupancy(sum(o.waiting for o in each), sum(o.running for o in each))
