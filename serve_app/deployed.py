"""The application for a declaration that Serve is given by others: KubeRay, ``serve deploy``, its REST API.

    applications:
      - name: whisper
        import_path: serve_app.deployed:application
        args: {model: {source: embedded:base, device: cpu}, encoder: {replicas: 2}}

``args`` are the settings, as in a YAML file of them. Serve calls the function in a process of the cluster, whose
environment counts too (``WHISPER_SERVE_…``), after ``args``.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from serve_app.app import build
from serve_app.settings import Settings


def application(args: dict[str, Any]) -> serve.Application:
    """Raises ValueError where ``args`` are no settings, or hold API keys: Serve logs arguments and shows them."""
    http = args.get("http")
    if isinstance(http, dict) and "api_keys" in http:
        raise ValueError(
            "http.api_keys cannot be an argument, for Serve shows arguments on its dashboard: write the keys to a file "
            "that the API's replicas can read, one a line, and name it by http.api_keys_file"
        )
    return build(Settings(**args))
