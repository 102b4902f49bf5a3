"""The stand-in keeps the contract of the real one, by the words of the real client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from tests.k8s.apiserver import ADMIN, CONTROLLER, JSON_PATCH, MERGE, STRATEGIC, ApiServer
from tests.k8s.controller import LEASE, NAMESPACE, RAYSERVICE, Operator

Watch: Any = watch.Watch
RAYSERVICES = ("ray.io", "v1", NAMESPACE, "rayservices")


def connected(server: ApiServer, path: Path, token: str) -> client.ApiClient:
    settings = client.Configuration()
    config.load_kube_config(  # type: ignore[no-untyped-call]
        str(server.kubeconfig(path / token, token)), client_configuration=settings
    )
    settings.retries = False
    return client.ApiClient(settings)


@pytest.fixture
def admin(server: ApiServer, tmp_path: Path) -> client.ApiClient:
    return connected(server, tmp_path, ADMIN)


@pytest.fixture
def leases(admin: client.ApiClient) -> client.CoordinationV1Api:
    api = client.CoordinationV1Api(admin)
    api.create_namespaced_lease(NAMESPACE, lease())
    return api


@pytest.fixture
def objects(admin: client.ApiClient, operator: Operator) -> Any:
    operator.rayservice("head")
    return client.CustomObjectsApi(admin)


def lease(**spec: Any) -> client.V1Lease:
    return client.V1Lease(
        metadata=client.V1ObjectMeta(name=LEASE, namespace=NAMESPACE), spec=client.V1LeaseSpec(**spec)
    )


def refused(status: int) -> Any:
    return pytest.raises(ApiException, check=lambda error: error.status == status)


def test_of_two_who_write_what_they_have_read_the_second_is_refused(leases: client.CoordinationV1Api) -> None:
    mine, yours = (leases.read_namespaced_lease(LEASE, NAMESPACE) for _ in range(2))
    assert mine.spec is not None
    assert yours.spec is not None
    mine.spec.holder_identity, yours.spec.holder_identity = "me", "you"
    leases.replace_namespaced_lease(LEASE, NAMESPACE, mine)
    with refused(409):
        leases.replace_namespaced_lease(LEASE, NAMESPACE, yours)
    found = leases.read_namespaced_lease(LEASE, NAMESPACE)
    assert found.spec is not None
    assert found.spec.holder_identity == "me"


def test_a_lease_cannot_be_written_unread_or_made_twice(leases: client.CoordinationV1Api) -> None:
    with refused(422):
        leases.replace_namespaced_lease(LEASE, NAMESPACE, lease())
    with refused(409):
        leases.create_namespaced_lease(NAMESPACE, lease())
    with refused(404):
        leases.read_namespaced_lease("another", NAMESPACE)


@pytest.mark.parametrize(
    ("kind", "patch", "status"),
    [
        (MERGE, {"spec": {"a": 1}}, 200),
        (MERGE, [{"op": "add"}], 400),
        (JSON_PATCH, [{"op": "add", "path": "/spec/a", "value": 1}], 200),
        (JSON_PATCH, {"spec": {"a": 1}}, 400),
        (JSON_PATCH, [{"op": "replace", "path": "/spec/b", "value": 1}], 422),
        (STRATEGIC, {"spec": {"a": 1}}, 415),
        ("application/json", {"spec": {"a": 1}}, 415),
    ],
)
def test_a_patch_says_what_it_is(server: ApiServer, objects: Any, kind: str, patch: Any, status: int) -> None:
    response = httpx.patch(
        f"http://127.0.0.1:{server.port}/apis/ray.io/v1/namespaces/{NAMESPACE}/rayservices/{RAYSERVICE}",
        json=patch,
        headers={"Content-Type": kind, "Authorization": f"Bearer {ADMIN}"},
    )
    assert response.status_code == status
    found = objects.get_namespaced_custom_object(*RAYSERVICES, RAYSERVICE)
    assert found["spec"] == ({"a": 1} if status == 200 else {})
    assert found["status"]["activeServiceStatus"] is not None


def test_spec_and_status_are_written_apart(objects: Any) -> None:
    both = {"spec": {"new": 1}, "status": {"new": 2}}
    objects.patch_namespaced_custom_object(*RAYSERVICES, RAYSERVICE, both)
    found = objects.get_namespaced_custom_object(*RAYSERVICES, RAYSERVICE)
    assert (found["spec"], "new" in found["status"]) == ({"new": 1}, False)
    objects.patch_namespaced_custom_object_status(*RAYSERVICES, RAYSERVICE, {"spec": None, "status": {"new": 2}})
    found = objects.get_namespaced_custom_object(*RAYSERVICES, RAYSERVICE)
    assert (found["spec"], found["status"]["new"]) == ({"new": 1}, 2)


def test_a_watch_brings_what_changes(objects: Any, operator: Operator) -> None:
    version = objects.list_namespaced_custom_object(*RAYSERVICES)["metadata"]["resourceVersion"]
    change = threading.Timer(0.3, lambda: operator.rayservice("another"))
    change.start()
    stream: Iterator[Any] = Watch().stream(
        objects.list_namespaced_custom_object, *RAYSERVICES, resource_version=version, timeout_seconds=1
    )
    event = next(stream)
    assert event["type"] == "MODIFIED"
    assert event["object"]["status"]["activeServiceStatus"]["rayClusterStatus"]["head"]["serviceName"] == "another"
    change.join()


def test_a_watch_from_what_is_forgotten_is_told_so(server: ApiServer, objects: Any, operator: Operator) -> None:
    operator.rayservice("another")
    server.compact()
    stream = Watch().stream(
        objects.list_namespaced_custom_object, *RAYSERVICES, resource_version="1", timeout_seconds=5
    )
    with refused(410):
        next(iter(stream))


def test_who_is_not_allowed_is_refused_and_told_why(server: ApiServer, objects: Any, tmp_path: Path) -> None:
    limited = client.CustomObjectsApi(connected(server, tmp_path, CONTROLLER))
    assert limited.get_namespaced_custom_object(*RAYSERVICES, RAYSERVICE)
    with pytest.raises(ApiException, match=r'cannot list resource \\?"rayservices') as refusal:
        limited.list_namespaced_custom_object(*RAYSERVICES)
    assert refusal.value.status == 403
    with refused(401):
        client.CustomObjectsApi(connected(server, tmp_path, "stranger")).list_namespaced_custom_object(*RAYSERVICES)


def test_a_dry_run_is_checked_and_not_kept(leases: client.CoordinationV1Api) -> None:
    found = leases.read_namespaced_lease(LEASE, NAMESPACE)
    assert found.spec is not None
    found.spec.holder_identity = "nobody"
    leases.replace_namespaced_lease(LEASE, NAMESPACE, found, dry_run="All")
    found = leases.read_namespaced_lease(LEASE, NAMESPACE)
    assert found.spec is not None
    assert found.spec.holder_identity is None
