"""The API server, as far as the controller needs it: the RayService's active cluster, and Events about it."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from k8s.exits import Ending, Exit

logger = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayservices"
CONTROLLER = "whisper-serve/autoscaler"
"""Who says so, in Events."""
NOTE_BYTES = 1024
"""An Event's note has no more."""
TIMEOUT_S = 1.5

T = TypeVar("T")


class ApiUnreachable(RuntimeError):
    """The API server does not answer, or not now: asked again it may."""


def connect() -> client.ApiClient:
    """By the environment: KUBECONFIG, or the pod's service account. Raises Ending where there is neither.

    A request is tried once: who waits here must notice an outage, and asks again anyway.
    """
    settings = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise Ending(Exit.API_LOST, f"neither a pod's service account nor KUBECONFIG: {error}") from None
    settings.retries = False
    return client.ApiClient(settings)


def called(what: str, call: Callable[[], T]) -> T:
    """What a call of the API gives.

    Raises Ending where RBAC refuses it, ApiUnreachable where the server is not there or not well, and ApiException for
    every other answer.
    """
    try:
        return call()
    except ApiException as error:
        if error.status in (401, 403):
            raise Ending(Exit.FORBIDDEN, f"{what}: {_message(error)}") from None
        if error.status == 429 or error.status >= 500:
            raise ApiUnreachable(f"{what}: the API server answers {error.status}: {_message(error)}") from None
        raise
    except HTTPError as error:
        raise ApiUnreachable(f"{what}: {error}") from None


@dataclass(frozen=True, slots=True)
class ActiveCluster:
    """The RayCluster that has the traffic. service: of its head."""

    name: str
    service: str


class Cluster:
    """One RayService. identity: of this controller, in Events."""

    def __init__(self, *, api: client.ApiClient, namespace: str, rayservice: str, identity: str):
        self._objects, self._events = client.CustomObjectsApi(api), client.EventsV1Api(api)
        self._namespace, self._name, self._identity = namespace, rayservice, identity
        self._uid: str | None = None

    def check(self) -> None:
        """Raises Ending where RBAC or the RayService's definition is missing, ApiUnreachable where the server is."""
        self.active()
        # a dry run goes through RBAC and is not kept
        event = self._event("Checked", "a permission was checked", warning=False)
        called(
            "creating an event",
            lambda: self._events.create_namespaced_event(
                self._namespace, event, dry_run="All", _request_timeout=TIMEOUT_S
            ),
        )

    def active(self) -> ActiveCluster | None:
        """None while there is no RayService of that name, or it has no active cluster. Raises as ``check``."""
        what = f"reading the RayService {self._namespace}/{self._name}"

        def get() -> Any:
            return self._objects.get_namespaced_custom_object(
                GROUP, VERSION, self._namespace, PLURAL, self._name, _request_timeout=TIMEOUT_S
            )

        try:
            found = called(what, get)
        except ApiException as error:
            if error.status != 404:
                raise
            if not _is_of_object(error):
                raise Ending(Exit.NO_CRD, f"{what}: there is no {PLURAL}.{GROUP}: is KubeRay installed?") from None
            self._uid = None
            return None
        self._uid = found["metadata"].get("uid")
        status = (found.get("status") or {}).get("activeServiceStatus") or {}
        service = ((status.get("rayClusterStatus") or {}).get("head") or {}).get("serviceName")
        name = status.get("rayClusterName")
        return ActiveCluster(name, service) if name and service else None

    def tell(self, reason: str, note: str, *, warning: bool = False) -> None:
        """An Event on the RayService, which `kubectl describe` shows. One that cannot be written is logged."""
        event = self._event(reason, note, warning=warning)
        try:
            called(
                "creating an event",
                lambda: self._events.create_namespaced_event(self._namespace, event, _request_timeout=TIMEOUT_S),
            )
        except (Ending, ApiUnreachable, ApiException) as error:
            logger.warning("the event %s was not written: %s", reason, error)

    def _event(self, reason: str, note: str, *, warning: bool) -> client.EventsV1Event:
        return client.EventsV1Event(
            metadata=client.V1ObjectMeta(name=f"{self._name}.{uuid.uuid4().hex[:16]}", namespace=self._namespace),
            event_time=micro_time(),
            reporting_controller=CONTROLLER,
            reporting_instance=self._identity[:128],
            action="Scale",
            reason=reason,
            note=note.encode()[:NOTE_BYTES].decode(errors="ignore"),
            type="Warning" if warning else "Normal",
            regarding=client.V1ObjectReference(
                api_version=f"{GROUP}/{VERSION}",
                kind="RayService",
                name=self._name,
                namespace=self._namespace,
                uid=self._uid,
            ),
        )


def micro_time() -> datetime:
    """Now. The API server takes times with six digits behind the point only; Python writes none where all are zero."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond or 1)


def _body(error: ApiException) -> dict[str, Any]:
    """The Status that the API server sends with an error; empty where it is none."""
    try:
        body = json.loads(error.body or "")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _message(error: ApiException) -> str:
    return str(_body(error).get("message") or error.reason)


def _is_of_object(error: ApiException) -> bool:
    """Is an object missing, and not the whole resource? Only of an object the Status has a name."""
    return bool((_body(error).get("details") or {}).get("name"))
