from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from k8s.config import parse
from k8s.prometheus import Prometheus, PrometheusError, Sample
from k8s.signals import application_query, dcgm_query
from tests.conftest import free_port
from tests.k8s.answering import Answering
from tests.k8s.test_config import text
from tests.prometheus import prometheus


def vector(*points: Any) -> dict[str, Any]:
    result = [{"metric": {"__name__": "up", "job": str(i)}, "value": point} for i, point in enumerate(points)]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


def test_a_vector_and_a_range_give_the_newest_sample_of_each_series(answer: Answering) -> None:
    client = Prometheus(url=answer.url)
    answer.json(vector([12.5, "1"], [12.5, "NaN"], [12.5, "+Inf"]))
    one, not_a_number, infinite = client.query("up")
    assert one == Sample("up", {"job": "0"}, 1.0, 12.5)
    assert math.isnan(not_a_number.value)
    assert infinite.value == math.inf
    series = {"metric": {"__name__": "up"}, "values": [[10.0, "1"], [11.0, "0.25"]]}
    answer.json({"status": "success", "data": {"resultType": "matrix", "result": [series]}})
    assert client.query("up[5s]") == [Sample("up", {}, 0.25, 11.0)]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (500, b"<html>gateway</html>", "answers 500 and no JSON"),
        (503, b'{"status": "error", "error": "overloaded"}', "answers 503: overloaded"),
        (400, b'{"status": "error", "errorType": "bad_data", "error": "parse error"}', "parse error"),
        (200, b"", "no JSON"),
        (200, b"[]", "no success"),
        (200, b'{"status": "success"}', "no vector"),
        (200, b'{"status": "success", "data": {"resultType": "scalar", "result": [1, "1"]}}', "no vector"),
        (200, b'{"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}}]}}', "no vector"),
        (200, b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},"values":[]}]}}', "no vector"),
        (
            200,
            b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"x"]}]}}',
            "vector",
        ),
    ],
)
def test_an_answer_that_is_none_is_named(answer: Answering, status: int, body: bytes, words: str) -> None:
    answer.status, answer.body = status, body
    with pytest.raises(PrometheusError, match=words):
        Prometheus(url=answer.url).query("up")


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(PrometheusError, match="does not answer"):
        Prometheus(url=f"http://127.0.0.1:{free_port()}").query("up")


def test_a_real_prometheus_takes_the_queries_and_says_what_is_wrong_with_a_selector(tmp_path: Path) -> None:
    with prometheus(tmp_path, []) as server:
        client = Prometheus(url=server.url)
        settings = parse(text(prometheus_selector='namespace="speech",job=~"whisper.*"', signals="dcgm"))
        assert client.query(application_query(settings)) == []
        assert client.query(dcgm_query(settings)) == []
        assert client.query("vector(3)")[0].value == 3.0
        with pytest.raises(PrometheusError, match="parse error"):
            client.query(application_query(parse(text(prometheus_selector="namespace=speech"))))
