"""Ray Serve's REST API on the head's dashboard: what there is, and its external scaling.

The token, where Ray asks for one, goes in the header ``Authorization: Bearer …``, which Ray 2.60's middleware reads
first (ray/_private/authentication/http_token_authentication.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

TIMEOUT_S = 3.0

ON = "external_scaler_enabled: true"


class ServeError(RuntimeError):
    """Serve did not do what it was asked. outcome: for metrics."""

    outcome: ClassVar[str] = "failed"


class Unreachable(ServeError):
    """The dashboard does not answer, or Serve's controller behind it does not."""

    outcome = "unreachable"


class Unauthorized(ServeError):
    """Ray's token is missing or wrong."""

    outcome = "unauthorized"


class NoApplication(ServeError):
    """Serve does not have the application, or not all of its deployments yet."""

    outcome = "no_application"


class ScalingOff(ServeError):
    """The application's configuration does not leave its replicas to others."""

    outcome = "scaling_off"


class BadAnswer(ServeError):
    """Something answers, but not as Serve does."""

    outcome = "bad_answer"


@dataclass(frozen=True, slots=True)
class Deployment:
    """target: replicas that Serve aims at. running: ids of those that take work."""

    target: int
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServeStatus:
    """Of the application. external: does it take replica counts from others?"""

    external: bool
    deployments: Mapping[str, Deployment]

    def running(self, deployment: str) -> tuple[str, ...]:
        found = self.deployments.get(deployment)
        return () if found is None else found.running


class ServeApi:
    """url: of the dashboard. token_file: read for each request, for tokens change; None where there is none."""

    def __init__(self, *, url: str, application: str, token_file: Path | None):
        self.url = url
        self._application, self._token_file = application, token_file
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def close(self) -> None:
        self._client.close()

    def status(self, needed: tuple[str, ...]) -> ServeStatus:
        """needed: deployments without which the application is not there yet. Raises ServeError."""
        response = self._ask("GET", "/api/serve/applications/")
        if response.status_code != 200:
            raise _error(response)
        try:
            applications = response.json()["applications"]
            if self._application not in applications:
                raise NoApplication(f"Serve at {self.url} has no application {self._application}")
            found = applications[self._application]
            deployments = {name: _deployment(each) for name, each in found["deployments"].items()}
            external = bool(found.get("external_scaler_enabled", False))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadAnswer(f"{self.url} does not answer like Ray Serve: {error!r}") from None
        if missing := [name for name in needed if name not in deployments]:
            raise NoApplication(f"the application {self._application} has no {', '.join(missing)} (yet)")
        return ServeStatus(external, deployments)

    def scale(self, deployment: str, replicas: int) -> None:
        """Asks for so many replicas; that they are there Serve tells later. Raises ServeError."""
        path = f"/api/v1/applications/{self._application}/deployments/{deployment}/scale"
        response = self._ask("POST", path, json={"target_num_replicas": replicas})
        if response.status_code != 200:
            raise _error(response)

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, headers=self._headers(), **content)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self.url} does not answer: {error or type(error).__name__}") from None

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        try:
            return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}
        except OSError as error:
            raise Unauthorized(f"Ray's token cannot be read: {error}") from None


def _deployment(details: Mapping[str, Any]) -> Deployment:
    running = tuple(each["replica_id"] for each in details["replicas"] if each["state"] == "RUNNING")
    return Deployment(int(details["target_num_replicas"]), running)


def _error(response: httpx.Response) -> ServeError:
    where, said = str(response.url), response.text[:300]
    match response.status_code:
        case 401 | 403:
            return Unauthorized(f"{where} wants another token: {said}")
        case 412 if "deleted" in said:
            return NoApplication(f"{where}: {said}")
        case 404:
            return NoApplication(f"{where}: {said}")
        case 412:
            return ScalingOff(f"{where}: the application's configuration needs `{ON}`: {said}")
        case status if status >= 500:
            return Unreachable(f"{where} answers {status}: {said}")
        case status:
            return BadAnswer(f"{where} answers {status}: {said}")
