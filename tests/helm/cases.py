"""The values matrix: what the chart is used for, each rendered, checked and held against a golden file."""

from __future__ import annotations

from typing import Any

from tests.helm.rendering import at, merged, values_of

SPLIT: dict[str, Any] = {
    "topology": "split",
    "groups": {
        "features": {"replicas": 1, "maxReplicas": 4},
        "encoder": {"replicas": 2, "minReplicas": 2, "maxReplicas": 16, "gpusPerPod": 2},
        "decoder": {"replicas": 3, "minReplicas": 3, "maxReplicas": 24, "nodeSelector": {"gpu": "h100"}},
    },
}

CONTROLLER: dict[str, Any] = {
    "autoscaling": {"by": "controller"},
    "controller": {"prometheusUrl": "http://prometheus.monitoring.svc:9090"},
}

INGRESS: dict[str, Any] = {
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "host": "speech.example.com",
        "tlsSecret": "speech-tls",
        "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "256m"},
    },
    "networkPolicy": {
        "api": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]}
    },
    "apiKeys": {"existingSecret": "speech-keys"},
}

ROUTE: dict[str, Any] = {
    "route": {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["speech.example.com"],
        "timeout": "3600s",
    },
    "networkPolicy": {
        "api": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}]}
    },
    "apiKeys": {"keys": ["sk-0123456789abcdef", "sk-fedcba9876543210"]},
}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": values_of("values-cpu.yaml"),
    "single-gpu": values_of("values-single-gpu.yaml"),
    "production": values_of("values-production.yaml"),
    "stage-groups": merged(SPLIT, CONTROLLER, at("monitoring.enabled", True)),
    "no-monitoring": CONTROLLER,
    "external-redis": {
        "faultTolerance": {
            "redis": "external",
            "address": "redis.cache.svc:6380",
            "username": "ray",
            "existingSecret": "redis-auth",
            "passwordKey": "pw",
        }
    },
    "existing-secrets": {
        "apiKeys": {"existingSecret": "keys", "key": "list"},
        "rayAuth": {"existingSecret": "token"},
        "faultTolerance": {"redis": "bundled", "existingSecret": "redis"},
        "imagePullSecrets": ["registry"],
    },
    "ingress": INGRESS,
    "route": ROUTE,
    "weights-image": {
        "weights": {"image": "registry.example.com/whisper-weights:large-v3"},
        "settings": {"model": {"source": "/models/large-v3.pt"}},
        "dcgm": {"enabled": True, "namespace": "gpu-operator"},
    },
    "download": {
        "weights": {"download": True},
        "settings": {"model": {"source": "large-v3-turbo"}, "encoder": {"num_gpus": 0.3, "budget_windows": 32}},
        "env": [{"name": "WHISPER_SERVE_AUDIO__WORKERS", "value": "4"}],
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "rayAuth": {"enabled": False},
    },
}
