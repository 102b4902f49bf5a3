"""templates/redis.yaml."""

from __future__ import annotations

from tests.helm.rendering import at, container, merged, mounted, named, objects, one, pods, ray_service

BUNDLED = at("faultTolerance.redis", "bundled")


def test_there_is_none_unless_it_is_asked_for() -> None:
    for values in ({}, at("faultTolerance", {"redis": "external", "address": "redis:6379"})):
        assert named(objects(values), "StatefulSet") == []


def test_it_is_where_the_head_looks_for_it() -> None:
    found = objects(BUNDLED)
    host, port = ray_service(found)["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    service = one(found, "Service", "-redis")
    assert service["metadata"]["name"] == host == one(found, "StatefulSet")["spec"]["serviceName"]
    assert [each["port"] for each in service["spec"]["ports"]] == [int(port)]


def test_it_keeps_what_it_knows_on_a_volume() -> None:
    values = at("faultTolerance.bundled", {"storage": "5Gi", "storageClassName": "fast", "image": "valkey:8"})
    redis = one(objects(merged(BUNDLED, values)), "StatefulSet")
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "5Gi"}}
    assert claim["spec"]["storageClassName"] == "fast"
    template = redis["spec"]["template"]
    assert mounted(template)["/data"] == claim["metadata"]["name"]
    assert container(template)["image"] == "valkey:8"
    script = container(template)["command"][-1]
    assert "--dir /data" in script
    assert "--appendonly yes" in script


def test_head_and_redis_have_the_same_password() -> None:
    for values in (BUNDLED, merged(BUNDLED, at("faultTolerance", {"existingSecret": "mine", "passwordKey": "pw"}))):
        found = objects(values)
        head = ray_service(found)["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
        variables = {v["name"]: v["valueFrom"] for v in container(pods(found)["redis"])["env"]}
        assert variables == {"REDIS_PASSWORD": head, "REDISCLI_AUTH": head}


def test_the_password_is_no_argument() -> None:
    command = container(pods(objects(BUNDLED))["redis"])["command"]
    server, *rest = command[-1].strip().splitlines()
    assert "PASSWORD" not in server
    assert server.endswith(" - <<END")  # the configuration comes by standard input
    assert rest == ["requirepass $REDIS_PASSWORD", "END"]
