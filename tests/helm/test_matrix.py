"""What holds for every case of the values matrix."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from k8s.config import parse
from serve_app.scaling.config import ScalingSettings
from serve_app.settings import Settings
from tests.helm import crds
from tests.helm.cases import CASES, CONTROLLER, INGRESS, ROUTE, SPLIT
from tests.helm.rendering import (
    CHART,
    GOLDEN,
    Object,
    arguments,
    check_built_in,
    container,
    manifest,
    merged,
    named,
    objects,
    one,
    parsed,
    pods,
    ray_groups,
    ray_service,
    render,
    serve_config,
)

GATEWAY = {"HTTPRoute"}
"""Kinds without a published schema here; tests/helm/test_exposure.py looks at each of their fields."""

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
"""What Chart.yaml asks for, and what there is."""

case = pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())


@case
def test_helm_lints_it(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True, namespace="asr", kube_version="1.36.0")
    assert report["errors"] == []
    worse = [message for message in report["messages"] if message["severity"] > 1]
    assert worse == []


@case
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(values: dict[str, Any], version: str) -> None:
    for each in objects(values):
        if each["kind"] not in {*crds.FILES, *GATEWAY}:
            check_built_in(each, version)


@case
def test_custom_resources_are_as_they_are_defined(values: dict[str, Any]) -> None:
    for each in objects(values):
        if each["kind"] in crds.FILES:
            crds.check(each)


@case
def test_the_pods_of_a_rayservice_are_pods(values: dict[str, Any]) -> None:
    """The definition of RayService leaves out most rules of pods; those of a Deployment's pods are whole."""
    for name, template in pods(objects(values)).items():
        # KubeRay's label, which the chart refers to
        labels = {**template["metadata"]["labels"], "ray.io/cluster": "speech-x"}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": name, "labels": labels},
            "spec": template["spec"],
        }
        for version in (OLDEST, NEWEST):
            check_built_in(pod, version)
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        if name == "redis":
            volumes.add("data")  # of the StatefulSet
        for each in containers(template):
            mounts = [mount["mountPath"] for mount in each.get("volumeMounts", [])]
            assert len(set(mounts)) == len(mounts)
            assert {mount["name"] for mount in each.get("volumeMounts", [])} <= volumes
            names = [variable["name"] for variable in each.get("env", [])]
            assert len(set(names)) == len(names), names


def test_a_misspelt_field_would_be_noticed() -> None:
    service = one(objects(), "RayService")
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        crds.check(service)
    deployment = one(objects(CONTROLLER), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        check_built_in(deployment, NEWEST)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_was_reviewed(name: str) -> None:
    reviewed = (GOLDEN / f"{name}.yaml").read_text()
    assert manifest(render(CASES[name])) == reviewed, "look at the difference, then: python -m tests.helm.write"


def test_there_is_no_other_golden_file() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("file", sorted(file.name for file in CHART.glob("values-*.yaml")))
def test_every_values_file_is_in_the_matrix(file: str) -> None:
    values = yaml.safe_load((CHART / file).read_text())
    assert values in CASES.values()


@case
def test_the_applications_settings_are_settings(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = objects(values)
    settings = Settings(**arguments(found))
    assert settings.app_name == serve_config(found)["applications"][0]["name"]
    assert settings.model.device == found_device(found), "left open, it would depend on pods that are not there yet"
    for name, value in values.get("settings", {}).get("encoder", {}).items():
        assert getattr(settings.encoder, name) == value


def found_device(found: list[Object]) -> str:
    gpus = any("GPU" in group["resources"] for group in ray_groups(found).values())
    return "cuda" if gpus else "cpu"


@case
def test_the_controllers_file_is_one(values: dict[str, Any]) -> None:
    found = objects(values)
    maps = [each for each in named(found, "ConfigMap") if "controller.yaml" in each["data"]]
    is_controlled = values.get("autoscaling", {}).get("by") == "controller"
    assert len(maps) == is_controlled
    for each in maps:
        settings = parse(each["data"]["controller.yaml"])
        assert settings.namespace == "asr"
        assert settings.rayservice == one(found, "RayService")["metadata"]["name"]
        assert settings.application == serve_config(found)["applications"][0]["name"]


@case
def test_replicas_fit_into_the_pods(values: dict[str, Any]) -> None:
    """As many as are asked for at the start find their resources in the pods that there are at the start."""
    found = objects(values)
    deployments = {name: part for name, part in arguments(found).items() if "replicas" in part}
    assert set(deployments) == {"http", "features", "encoder", "decoder"}
    groups = [group for name, group in ray_groups(found).items() if name != "head"]
    for deployment in deployments.values():
        ((resource, amount),) = deployment["resources"].items()
        (group,) = [each for each in groups if resource in each["resources"]]
        per_pod = int(group["resources"][resource]) // amount
        assert deployment["replicas"] == group["replicas"] * per_pod
        assert deployment["max_replicas_per_node"] == per_pod
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        gpus = sum(
            deployment["num_gpus"] * int(group["resources"][resource])
            for deployment in deployments.values()
            for resource in deployment["resources"]
            if resource in group["resources"] and "num_gpus" in deployment
        )
        most = float(group["resources"].get("GPU", 0))
        assert most / 2 < gpus <= most + 1e-9 or gpus == most == 0
    head = ray_groups(found)["head"]
    assert head["resources"] == {"CPU": "0"}, "no replica runs on the head"


@case
def test_limits_of_the_policy_are_those_of_the_pods(values: dict[str, Any]) -> None:
    found = objects(values)
    groups = ray_groups(found)
    cluster = ray_service(found)["rayClusterConfig"]
    (application,) = serve_config(found)["applications"]
    by = values.get("autoscaling", {}).get("by", "serve")
    assert cluster["enableInTreeAutoscaling"] == (by != "none")
    assert application.get("external_scaler_enabled", False) == (by == "controller")
    if by == "none":
        assert "scaling" not in arguments(found)
        assert all(g["minReplicas"] == g["maxReplicas"] for name, g in groups.items() if name != "head")
        return
    if by == "serve":
        policy = application["autoscaling_policy"]["policy_kwargs"]
        scaling, gpus = ScalingSettings(**policy["scaling"]), policy["gpus"]
        assert Settings(**arguments(found)).scaling == scaling
        assert scaling.enabled
    else:
        assert "scaling" not in arguments(found), "new thresholds would build the application anew"
        settings = parse(one(found, "ConfigMap", "-controller")["data"]["controller.yaml"])
        scaling, gpus = settings.scaling, settings.gpus
    assert gpus == {stage: arguments(found)[stage]["num_gpus"] for stage in ("features", "encoder", "decoder")}
    units = ["pods"] if "colocated" in groups else ["features", "encoder", "decoder"]
    for unit in units:
        group = groups["colocated" if unit == "pods" else unit]
        per_pod = int(group["resources"]["stage_decoder" if unit == "pods" else f"stage_{unit}"])
        limits = scaling.limits(unit)
        assert limits.min_replicas == group["minReplicas"] * per_pod
        assert limits.max_replicas == group["maxReplicas"] * per_pod


def containers(template: Object) -> Iterator[Object]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


@case
def test_every_container_is_restricted(values: dict[str, Any]) -> None:
    """Kubernetes' pod security standard "restricted", and more."""
    found = objects(values)
    for name, template in pods(found).items():
        pod = template["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is (name == "controller")
        autoscaler = ray_service(found)["rayClusterConfig"].get("autoscalerOptions")
        for each in [*containers(template), *([autoscaler] if autoscaler and name == "head" else [])]:
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context.get("privileged")
            assert {"cpu", "memory"} <= set(each["resources"]["requests"])
            assert "memory" in each["resources"]["limits"]
            assert not each.get("image", "").endswith(":latest")


@case
def test_what_is_written_ends_with_the_pod(values: dict[str, Any]) -> None:
    found = objects(values)
    for name, template in pods(found).items():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for each in containers(template):
            for mount in each["volumeMounts"]:
                if not mount.get("readOnly") and mount["name"] != "data":
                    assert "emptyDir" in volumes[mount["name"]], (name, mount)
                    assert "sizeLimit" in volumes[mount["name"]]["emptyDir"]
    for name, group in ray_groups(found).items():
        assert group["rayStartParams"]["object-spilling-directory"].startswith("/tmp/"), name
        (shm,) = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        size = int(re.fullmatch(r"(\d+)Mi", shm["sizeLimit"])[1]) * 2**20  # type: ignore[index]
        assert int(group["rayStartParams"]["object-store-memory"]) < size
        assert shm["medium"] == "Memory"


@case
def test_probes_and_draining(values: dict[str, Any]) -> None:
    for name, template in pods(objects(values)).items():
        main = container(template)
        assert {"livenessProbe", "readinessProbe"} <= set(main), name
        if name not in ("controller", "redis"):
            env = {variable["name"]: variable.get("value") for variable in main["env"]}
            drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert 0 < drain < template["spec"]["terminationGracePeriodSeconds"]


@case
def test_roles_name_what_they_allow(values: dict[str, Any]) -> None:
    found = objects(values)
    assert not named(found, "ClusterRole") + named(found, "ClusterRoleBinding")
    for role in named(found, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            assert "secrets" not in rule["resources"]


@case
def test_accounts_are_there_and_have_no_tokens_by_themselves(values: dict[str, Any]) -> None:
    found = objects(values)
    accounts = {each["metadata"]["name"]: each for each in named(found, "ServiceAccount")}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert {template["spec"]["serviceAccountName"] for template in pods(found).values()} == set(accounts)


@case
def test_selectors_pick_pods_that_there_are(values: dict[str, Any]) -> None:
    found = objects(values)
    labels = {name: template["metadata"]["labels"] for name, template in pods(found).items()}
    for each in found:
        spec = each.get("spec") or {}
        if each["kind"] == "NetworkPolicy":
            assert picked(spec["podSelector"], labels), each["metadata"]["name"]
            for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                for peer in [*rule.get("from", []), *rule.get("to", [])]:
                    if set(peer) == {"podSelector"} and peer["podSelector"]:
                        assert picked(peer["podSelector"], labels), each["metadata"]["name"]
        elif each["kind"] == "Service":
            chosen = picked({"matchLabels": spec["selector"]}, labels)
            assert len(chosen) == 1
            ports = {port["name"] for port in container(pods(found)[chosen[0]])["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        elif each["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            assert picked(spec["selector"], labels)
        elif each["kind"] == "ServiceMonitor":
            services = {s["metadata"]["name"]: s["metadata"]["labels"] for s in named(found, "Service")}
            assert len(picked(spec["selector"], services)) == 1
        elif each["kind"] in ("Deployment", "StatefulSet"):
            assert len(picked(spec["selector"], labels)) == 1
    for template in pods(found).values():
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            assert picked(constraint["labelSelector"], labels) == [
                template["metadata"]["labels"]["app.kubernetes.io/component"]
            ]


def picked(selector: Object, labels: dict[str, dict[str, str]]) -> list[str]:
    """Whose labels a selector fits."""
    return [
        name
        for name, has in labels.items()
        if all(has.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())
        and all(
            expression["operator"] == "In" and has.get(expression["key"]) in expression["values"]
            for expression in selector.get("matchExpressions", [])
        )
    ]


@case
def test_what_is_referred_to_is_there(values: dict[str, Any]) -> None:
    """Secrets, claims and config maps are the release's own, or named in the values."""
    found = objects(values)
    own = {kind: {each["metadata"]["name"] for each in named(found, kind)} for kind in ("Secret", "ConfigMap")}
    given = set(re.findall(r"[\w./:-]+", yaml.safe_dump(values)))
    for template in [*pods(found).values(), ray_service(found)["rayClusterConfig"]]:
        for kind, name in referred(template):
            assert name in own.get(kind, set()) | given | {"kube-root-ca.crt"}, (kind, name)


def referred(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            match key, inner:
                case "secretName", str():
                    yield "Secret", inner
                case "secretKeyRef", {"name": str(name)}:
                    yield "Secret", name
                case "configMap", {"name": str(name)}:
                    yield "ConfigMap", name
                case "claimName", str():
                    yield "PersistentVolumeClaim", inner
                case _:
                    yield from referred(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from referred(inner)


@case
def test_names_are_unique(values: dict[str, Any]) -> None:
    found = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects(values)]
    assert len(set(found)) == len(found)


EVERYTHING = merged(CASES["production"], SPLIT, INGRESS, ROUTE, {"apiKeys": {"existingSecret": ""}})


@pytest.mark.parametrize(
    "release", ["a", "0-starts-with-a-digit", "with.a.dot", "x" * 53, "whisper-serve", "speech-" + "y" * 46]
)
@pytest.mark.parametrize("values", [CASES["production"], EVERYTHING], ids=["production", "everything"])
def test_names_fit_whatever_the_release_is_called(release: str, values: dict[str, Any]) -> None:
    found = objects(values, name=release)
    for each in found:
        name = each["metadata"]["name"]
        assert len(name) <= 63, name
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), name
    service = one(found, "RayService")
    assert len(service["metadata"]["name"]) <= 47, "KubeRay takes no longer ones"
    for value in labels_of(found):
        assert len(value) <= 63
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value), value


def labels_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("labels", "matchLabels") and isinstance(inner, dict):
                yield from map(str, inner.values())
            else:
                yield from labels_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from labels_of(inner)


def test_long_names_that_begin_alike_stay_apart() -> None:
    one_, other = ("speech-recognition-for-the-contact-centre-" + end for end in ("north", "south"))
    names = [{each["metadata"]["name"] for each in objects(name=release)} for release in (one_, other)]
    assert not names[0] & names[1]


def test_the_same_values_give_the_same_pods() -> None:
    """Only secrets are random: anything else would build a new cluster with each upgrade."""
    first, second = (objects(CASES["production"]) for _ in range(2))
    differing = {a["kind"] for a, b in zip(first, second, strict=True) if a != b}
    assert differing == {"Secret"}


def test_a_new_version_of_the_chart_alone_builds_no_new_cluster(tmp_path: Path) -> None:
    copy = tmp_path / "whisper-serve"
    shutil.copytree(CHART, copy)
    text = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(re.sub(r"(?m)^version: .*", "version: 9.9.9", text))
    with helm_python.Chart.load(copy) as newer:
        rendered = newer.render(CASES["production"], name="speech", namespace="asr")
    found = list(parsed(rendered))
    assert "9.9.9" in one(found, "RayService")["metadata"]["labels"]["helm.sh/chart"]
    before = objects(CASES["production"])
    assert ray_service(found) == ray_service(before)
    assert pods(found) == pods(before)
