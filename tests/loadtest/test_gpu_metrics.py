from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from loadtest.gpu import metrics
from loadtest.gpu.nvidia_smi import Monitor, NvidiaSmiFailed, Row, query, read_dmon
from loadtest.gpu.readings import PHASES, Phase, Reading, Result, agree, compare, failures
from tests.loadtest.gpu_systems import SMALL

DMON = """\
#Date       Time        gpu    pwr  gtemp  mtemp     sm    mem    enc    dec    jpg    ofa     fb   bar1   ccpm  smutil   smocc  mmaact    dram
#YYYYMMDD   HH:MM:SS    Idx      W      C      C      %      %      %      %      %      %     MB     MB     MB  GPM:%   GPM:%   GPM:%   GPM:%
 20251122   10:00:00      0    112     41     52      0      0      0      0      0      0   1024      1      0       -       -       -       -
 20251122   10:00:01      0    640     55     70    100     34      0      0      0      0  40960      1      0      96      21      58      34
#Date       Time        gpu    pwr  gtemp  mtemp     sm    mem    enc    dec    jpg    ofa     fb   bar1   ccpm  smutil   smocc  mmaact    dram
#YYYYMMDD   HH:MM:SS    Idx      W      C      C      %      %      %      %      %      %     MB     MB     MB  GPM:%   GPM:%   GPM:%   GPM:%
 20251122   10:00:02      0    650     56     70    100     34      0      0      0      0  40960      1      0      97      22      59      35
 20251122   10:00
"""  # noqa: E501


def test_dmons_table_is_read_by_its_header() -> None:
    first, second, third = read_dmon(DMON.splitlines())
    assert "sm_utilization" not in first.values
    assert first.values["power_w"] == 112
    assert second.values["sm_utilization"] == pytest.approx(0.96)
    assert second.values["tensor_activity"] == pytest.approx(0.58)
    assert second.values["memory_used"] == 40960 * 2**20
    assert (second.at - first.at, third.at - second.at) == (1, 1)
    assert first.at == time.mktime((2025, 11, 22, 10, 0, 0, 0, 0, -1))


def test_what_is_no_table_has_no_rows() -> None:
    assert read_dmon(["Unable to determine the device handle", "", "0 1 2"]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_nvidia_smi_the_error_says_so() -> None:
    with pytest.raises(NvidiaSmiFailed, match="nvidia-smi"):
        Monitor(0, 1, gpm=False)
    with pytest.raises(NvidiaSmiFailed, match="nvidia-smi"):
        query(0)


def phases(seconds: float = 10.0) -> list[Phase]:
    return [
        Phase(name, begin=i * seconds, end=(i + 1) * seconds, windows=100, operations=0 if name == "idle" else 1e15)
        for i, name in enumerate(PHASES)
    ]


def result(sm: float = 0.9, sm_theirs: float = 0.9, tflops: float = 100.0) -> Result:
    ours, theirs = [], []
    for phase in phases():
        idle = phase.name == "idle"
        for second in range(1, 10):
            values = {"sm_utilization": 0.0 if idle else sm, "tflops": 0.0 if idle else tflops, "tensor_activity": 0.3}
            ours.append(Reading(phase.begin + second, 1.0, values))
            theirs.append(Row(phase.begin + second, {"sm_utilization": 0.0 if idle else sm_theirs}))
    return Result(phases(), ours, theirs)


def test_readings_that_agree_are_confirmed() -> None:
    compared = compare(result(), peak=989.0, ranges={"encoder": {"sm_utilization": (0.8, 1.0)}})
    assert failures(compared, needed=["sm_utilization", "tflops"], ranged=True) == []
    encoder = {c.metric: c for c in compared if c.phase == "encoder"}
    assert encoder["tflops"].theirs == pytest.approx(100)
    assert encoder["tflops by Tensor Cores"].agrees
    assert (encoder["sm_utilization"].low, encoder["sm_utilization"].high) == (0.9, 0.9)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sm_theirs": 0.7}, "sm_utilization 0.9, beside 0.7"),
        ({"sm": 0.4, "sm_theirs": 0.4}, "out of"),
        ({"tflops": 150.0}, "tflops 150"),
    ],
)
def test_readings_that_do_not_agree_are_told(changed: dict[str, float], said: str) -> None:
    compared = compare(result(**changed), peak=None, ranges={"encoder": {"sm_utilization": (0.8, 1.0)}})
    assert any(said in line for line in failures(compared, needed=["tflops"], ranged=True))


def test_operations_that_the_tensor_cores_had_no_time_for_are_told() -> None:
    compared = compare(result(), peak=200.0, ranges={})  # 0.3 of 200 is less than 100
    assert any("by Tensor Cores" in line for line in failures(compared, needed=[], ranged=False))


def test_a_reading_without_a_second_one_is_told() -> None:
    compared = compare(result(), peak=None, ranges={})
    assert "encoder: no second reading of power_w" in failures(compared, needed=["power_w"], ranged=False)


def test_tolerances_are_absolute_for_shares_and_relative_for_amounts() -> None:
    assert agree("sm_utilization", 0.02, 0.06)
    assert not agree("sm_utilization", 0.80, 0.90)
    assert agree("power_w", 600, 650)
    assert not agree("tflops", 100, 120)


def test_the_load_alone_runs_on_a_cpu(tmp_path: Path) -> None:
    json_file, plot_file = tmp_path / "metrics.json", tmp_path / "metrics.png"
    arguments = ["--device", "cpu", "--seconds", "12", "--windows", "2"]
    status = metrics.main([*arguments, "--json", str(json_file), "--plot", str(plot_file)], {"large-v3": SMALL})
    raw = json.loads(json_file.read_text())
    assert (status, raw["failures"]) == (0, [])
    assert [phase["name"] for phase in raw["phases"]] == list(PHASES)
    by_name = {phase["name"]: phase for phase in raw["phases"]}
    assert by_name["idle"]["operations"] == 0
    assert by_name["encoder"]["windows"] > 0
    assert by_name["engine"]["tokens"] == 128 * by_name["engine"]["windows"] > 0
    tflops = {c["phase"]: c for c in raw["compared"] if c["metric"] == "tflops"}
    assert all(tflops[phase]["agrees"] for phase in PHASES)
    assert tflops["encoder"]["ours"] > 0
    assert plot_file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
