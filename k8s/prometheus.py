"""Prometheus, as far as it is asked here: instant queries of its HTTP API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT_S = 3.0


class PrometheusError(RuntimeError):
    """It does not answer, or not with what was asked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The newest sample of a series. labels: its own, without the metric's name. at: Unix time; of an instant vector
    that of the evaluation, of a range that of the sample."""

    name: str
    labels: Mapping[str, str]
    value: float
    at: float


class Prometheus:
    """url: without /api/v1."""

    def __init__(self, *, url: str):
        self._url = f"{url}/api/v1/query"
        self._client = httpx.Client(timeout=TIMEOUT_S)

    def close(self) -> None:
        self._client.close()

    def query(self, expression: str) -> list[Sample]:
        """The newest sample of every series. Raises PrometheusError."""
        try:
            # by POST, for expressions are long
            response = self._client.post(self._url, data={"query": expression})
        except httpx.HTTPError as error:
            raise PrometheusError(f"{self._url} does not answer: {error or type(error).__name__}") from None
        try:
            answer = response.json()
        except ValueError:
            raise PrometheusError(f"{self._url} answers {response.status_code} and no JSON") from None
        if not isinstance(answer, dict) or answer.get("status") != "success":
            said = answer.get("error", "") if isinstance(answer, dict) else ""
            raise PrometheusError(f"{self._url} answers {response.status_code}: {said or 'no success'}")
        try:
            return _samples(answer["data"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PrometheusError(f"{self._url} answers what is no vector and no matrix: {error!r}") from None


def _samples(data: Mapping[str, Any]) -> list[Sample]:
    kind = data["resultType"]
    if kind not in ("vector", "matrix"):
        raise ValueError(kind)
    return [_sample(series, series["value"] if kind == "vector" else series["values"][-1]) for series in data["result"]]


def _sample(series: Mapping[str, Any], point: Sequence[Any]) -> Sample:
    labels = {str(label): str(value) for label, value in series["metric"].items()}
    at, value = point
    if not math.isfinite(at):
        raise ValueError(at)
    return Sample(labels.pop("__name__", ""), labels, float(value), float(at))
