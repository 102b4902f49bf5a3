"""templates/rayservice.yaml and templates/_pod.tpl."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helm.cases import CASES, CONTROLLER, SPLIT
from tests.helm.rendering import (
    arguments,
    at,
    container,
    merged,
    mounted,
    objects,
    pods,
    ray_groups,
    ray_service,
    serve_config,
)

STAGES = ("features", "encoder", "decoder")


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container(pod)["env"]}


def test_colocated_pods_have_one_gpu_and_all_stages() -> None:
    groups = ray_groups(objects())
    assert set(groups) == {"head", "api", "colocated"}
    stages = {f"stage_{stage}": "1" for stage in STAGES}
    assert groups["colocated"]["resources"] == {"GPU": "1", **stages}
    limits = container(groups["colocated"]["template"])["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert all(arguments(objects())[stage]["max_replicas_per_node"] == 1 for stage in STAGES)


def test_stage_groups_have_a_gpu_for_each_replica() -> None:
    found = objects(SPLIT)
    groups = ray_groups(found)
    assert set(groups) == {"head", "api", *STAGES}
    assert groups["encoder"]["resources"] == {"GPU": "2", "stage_encoder": "2"}
    resources = container(groups["encoder"]["template"])["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 2
    encoder = arguments(found)["encoder"]
    assert (encoder["num_gpus"], encoder["replicas"], encoder["resources"]) == (1, 4, {"stage_encoder": 1})


def test_without_gpus_nothing_asks_for_one() -> None:
    found = objects(CASES["cpu"])
    assert "nvidia.com/gpu" not in json.dumps(found)
    assert "GPU" not in ray_groups(found)["colocated"]["resources"]
    assert all(arguments(found)[stage]["num_gpus"] == 0 for stage in STAGES)
    split = objects(merged(CASES["cpu"], SPLIT))
    assert ray_groups(split)["encoder"]["resources"] == {"stage_encoder": "1"}


def test_another_vendors_gpu() -> None:
    found = objects(at("stagePods", {"gpuResource": "amd.com/gpu"}))
    assert container(pods(found)["colocated"])["resources"]["limits"]["amd.com/gpu"] == 1


def test_the_api_has_a_pod_for_each_replica_or_for_several() -> None:
    found = objects(at("api", {"replicas": 3, "replicasPerPod": 2}))
    group = ray_groups(found)["api"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    assert group["resources"] == {"api": "2"}
    http = arguments(found)["http"]
    assert (http["replicas"], http["max_replicas_per_node"]) == (6, 2)


def test_settings_reach_the_application_as_they_are() -> None:
    given = {"vad": {"threshold": 0.4}, "decoder": {"slots": 64}, "request": {"max_active": 100}}
    args = arguments(objects({"settings": given}))
    assert args["vad"] == given["vad"]
    assert args["request"] == given["request"]
    assert args["decoder"]["slots"] == 64


def test_who_decides_on_replicas() -> None:
    (by_serve,) = serve_config(objects())["applications"]
    assert by_serve["autoscaling_policy"]["policy_function"] == "serve_app.scaling.mount:ServePolicy"
    assert by_serve["args"]["scaling"]["enabled"] is True
    (by_controller,) = serve_config(objects(CONTROLLER))["applications"]
    assert by_controller["external_scaler_enabled"] is True
    assert "autoscaling_policy" not in by_controller
    (by_nobody,) = serve_config(objects(at("autoscaling.by", "none")))["applications"]
    assert not {"external_scaler_enabled", "autoscaling_policy"} & set(by_nobody)


def test_kuberays_autoscaler() -> None:
    cluster = ray_service(objects(at("autoscaling", {"idleTimeoutSeconds": 300, "version": "v1"})))["rayClusterConfig"]
    options = cluster["autoscalerOptions"]
    assert (options["version"], options["idleTimeoutSeconds"]) == ("v1", 300)
    head = cluster["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in options["volumeMounts"]}
    token = mounts["/var/run/secrets/kubernetes.io/serviceaccount"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == token]
    paths = [
        item["path"]
        for source in volume["projected"]["sources"]
        for kind, content in source.items()
        for item in ([content] if kind == "serviceAccountToken" else content["items"])
    ]
    assert sorted(paths) == ["ca.crt", "namespace", "token"]
    assert token not in mounted({"spec": head}).values(), "it is for the autoscaler alone"
    unscaled = ray_service(objects(at("autoscaling.by", "none")))["rayClusterConfig"]
    assert "autoscalerOptions" not in unscaled
    assert "autoscaler-token" not in json.dumps(unscaled)


def test_the_head_runs_no_replica_and_tells_its_ports() -> None:
    head = ray_groups(objects())["head"]
    assert head["resources"] == {"CPU": "0"}
    ports = {port["name"]: port["containerPort"] for port in container(head["template"])["ports"]}
    assert ports == {
        "gcs-server": 6379,
        "dashboard": 8265,
        "serve": 8000,
        "metrics": 8080,
        "as-metrics": 44217,
        "dash-metrics": 44227,
    }


def test_resources_are_named_once() -> None:
    """KubeRay refuses them in the group's field and in rayStartParams at the same time."""
    for group in ray_groups(objects(CASES["production"])).values():
        assert not {"num-cpus", "num-gpus", "memory", "resources", "labels"} & set(group["rayStartParams"])


def test_ray_asks_for_a_token() -> None:
    cluster = ray_service(objects())["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "speech-whisper-serve-ray-token"}
    existing = ray_service(objects(at("rayAuth.existingSecret", "mine")))["rayClusterConfig"]
    assert existing["authOptions"]["secretName"] == "mine"
    assert "authOptions" not in ray_service(objects(at("rayAuth.enabled", False)))["rayClusterConfig"]


@pytest.mark.parametrize("strategy", ["NewCluster", "None"])
def test_upgrades(strategy: str) -> None:
    spec = ray_service(objects(at("upgrade", {"strategy": strategy, "deletionDelaySeconds": 30})))
    assert spec["upgradeStrategy"] == {"type": strategy}
    assert spec["rayClusterDeletionDelaySeconds"] == 30


def test_a_pod_that_ends_has_time_to() -> None:
    for pod in ray_groups(objects(at("drain.timeoutSeconds", 20))).values():
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] == 50
        assert environment(pod["template"])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "20"


def test_api_pods_are_ready_when_their_proxy_answers() -> None:
    found = pods(objects())
    assert container(found["api"])["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    for name in ("head", "colocated"):
        assert container(found[name])["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    for pod in found.values():
        assert container(pod)["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_api_keys_are_mounted_for_the_api_alone() -> None:
    found = objects(at("apiKeys", {"existingSecret": "mine", "key": "list"}))
    templates = pods(found)
    with_keys = [name for name, pod in templates.items() if "api-keys" in json.dumps(pod)]
    assert with_keys == ["api"]
    (volume,) = [v for v in templates["api"]["spec"]["volumes"] if v["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "mine"
    ((item),) = volume["secret"]["items"]
    folder = {name: path for path, name in mounted(templates["api"]).items()}["api-keys"]
    assert item["key"] == "list"
    assert arguments(found)["http"]["api_keys_file"] == f"{folder}/{item['path']}"
    assert "api_keys_file" not in arguments(objects())["http"]


def test_weights_of_a_claim_are_mounted_for_stages_alone() -> None:
    found = pods(objects({"weights": {"existingClaim": "w"}, "settings": {"model": {"source": "/models/large-v3.pt"}}}))
    assert [name for name, pod in found.items() if "/models" in mounted(pod)] == ["colocated"]
    (volume,) = [v for v in found["colocated"]["spec"]["volumes"] if v["name"] == "weights"]
    assert volume["persistentVolumeClaim"] == {"claimName": "w", "readOnly": True}


def test_weights_of_an_image_are_copied_first() -> None:
    found = pods(
        objects(
            {
                "weights": {"image": "w:1", "imagePath": "/data", "sizeLimit": "5Gi"},
                "settings": {"model": {"source": "/models/large-v3.pt"}},
            }
        )
    )
    (first,) = found["colocated"]["spec"]["initContainers"]
    assert (first["image"], first["args"]) == ("w:1", ["/data"])
    assert first["volumeMounts"] == [{"name": "weights", "mountPath": "/models"}]
    (volume,) = [v for v in found["colocated"]["spec"]["volumes"] if v["name"] == "weights"]
    assert volume["emptyDir"] == {"sizeLimit": "5Gi"}
    assert "initContainers" not in found["api"]["spec"]
    assert "initContainers" not in pods(objects())["colocated"]["spec"]


def test_the_command_that_copies_weights_copies_them(tmp_path: Path) -> None:
    (first,) = pods(objects(CASES["weights-image"]))["colocated"]["spec"]["initContainers"]
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "deep").mkdir(parents=True)
    target.mkdir()
    (source / "deep" / "weights.pt").write_text("w")
    command = [part.replace("/models/", f"{target}/") for part in first["command"]]
    subprocess.run([*command, str(source)], check=True)
    assert (target / "deep" / "weights.pt").read_text() == "w"


def test_gcs_survives_the_head_with_redis() -> None:
    def options(values: dict[str, Any]) -> Any:
        return ray_service(objects(values))["rayClusterConfig"].get("gcsFaultToleranceOptions")

    assert options({}) is None
    assert options(CASES["external-redis"]) == {
        "redisAddress": "redis.cache.svc:6380",
        "redisUsername": {"value": "ray"},
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis-auth", "key": "pw"}}},
    }
    assert options(at("faultTolerance.redis", "bundled")) == {
        "redisAddress": "speech-whisper-serve-redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "speech-whisper-serve-redis", "key": "password"}}},
    }
    open_redis = options(at("faultTolerance", {"redis": "external", "address": "redis:6379"}))
    assert open_redis == {"redisAddress": "redis:6379"}


def test_where_pods_run() -> None:
    values = {
        "stagePods": {
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "annotations": {"a": "b"},
        },
        "groups": {"colocated": {"nodeSelector": {"gpu": "h100"}}},
        "api": {"affinity": {"nodeAffinity": {}}, "nodeSelector": {"pool": "cpu"}},
        "head": {"nodeSelector": {"pool": "system"}, "annotations": {"c": "d"}},
    }
    found = pods(objects(values))
    stage = found["colocated"]["spec"]
    assert stage["nodeSelector"] == {"zone": "a", "gpu": "h100"}
    assert stage["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert (stage["priorityClassName"], stage["runtimeClassName"]) == ("high", "nvidia")
    assert found["colocated"]["metadata"]["annotations"] == {"a": "b"}
    assert found["api"]["spec"]["nodeSelector"] == {"pool": "cpu"}
    assert found["api"]["spec"]["affinity"] == {"nodeAffinity": {}}
    assert found["head"]["spec"]["nodeSelector"] == {"pool": "system"}
    assert found["head"]["metadata"]["annotations"] == {"c": "d"}
    # a GPU's taint is tolerated where GPUs are used, and nowhere else
    default = pods(objects())
    assert [name for name, pod in default.items() if "tolerations" in pod["spec"]] == ["colocated"]


def test_pods_of_a_kind_are_spread() -> None:
    found = pods(objects(at("topologySpread", {"topologyKeys": ["rack"], "whenUnsatisfiable": "DoNotSchedule"})))
    (constraint,) = found["api"]["spec"]["topologySpreadConstraints"]
    assert (constraint["topologyKey"], constraint["whenUnsatisfiable"]) == ("rack", "DoNotSchedule")
    assert constraint["matchLabelKeys"] == ["ray.io/cluster"], "each cluster by itself"
    off = pods(objects(at("topologySpread.enabled", False)))
    assert not any("topologySpreadConstraints" in pod["spec"] for pod in off.values())


def test_the_image() -> None:
    def image(values: dict[str, Any]) -> set[str]:
        return {container(pod)["image"] for pod in pods(objects(merged(values, CONTROLLER))).values()}

    assert image({}) == {"whisper-serve:0.1.0"}
    assert image(at("image", {"repository": "host:5000/asr", "tag": "dev"})) == {"host:5000/asr:dev"}
    digest = "sha256:" + "0" * 64
    assert image(at("image", {"tag": "dev", "digest": digest})) == {f"whisper-serve@{digest}"}
    pulled = pods(objects(at("imagePullSecrets", ["registry"])))
    assert all(pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] for pod in pulled.values())


def test_variables_of_the_environment() -> None:
    given = [
        {"name": "WHISPER_SERVE_AUDIO__WORKERS", "value": "4"},
        {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]
    for group in ray_groups(objects({"env": given})).values():
        variables = environment(group["template"])
        assert variables["WHISPER_SERVE_AUDIO__WORKERS"] == "4"
        assert variables["A"] == given[1]["valueFrom"]
        # the root file system is read-only
        assert variables["HOME"] == "/tmp"
        assert variables["XDG_CACHE_HOME"].startswith("/tmp/")
        # three pods less one are two full ones and an empty one, which the autoscaler can remove
        assert variables["RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"] == "1"


def test_who_the_containers_are() -> None:
    found = pods(objects(at("securityContext", {"runAsUser": 2000, "runAsGroup": 3000, "fsGroup": 4000})))
    for pod in found.values():
        security = pod["spec"]["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (2000, 3000, 4000)
