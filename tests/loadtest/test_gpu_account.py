from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.encoder_attention import reference
from loadtest.gpu.account import __main__ as account
from loadtest.gpu.account.__main__ import measure
from loadtest.gpu.account.attention import (
    SECTORS,
    compared_sectors,
    launch_plain,
    ncu_command,
    numpy_attention,
    python_attention,
    python_milliseconds,
)
from loadtest.gpu.account.comparison import Comparison, NotMeasured, Setting
from loadtest.gpu.account.precision import compared_precision
from loadtest.gpu.run import Run, Size
from tests.loadtest.gpu_systems import SMALL

LOADS, READS = SECTORS
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_row(launch: int, metric: str, value: str) -> str:
    kernel = '"77","python3","127.0.0.1","encoder_attention_simple","1","7","(128, 1, 1)","(375, 6, 1)","0","9.0"'
    return f'"{launch}",{kernel},"Command line profiler metrics","{metric}","sector","{value}"'


NCU = "\n".join(
    [
        "==PROF== Connected to process 77 (/usr/bin/python3)",
        '==PROF== Profiling "encoder_attention_simple" - 0: 0%....50%....100% - 1 pass',
        HEADER,
        ncu_row(0, LOADS, "324,864,000"),
        ncu_row(0, READS, "9,000"),
        ncu_row(1, LOADS, "46,000,000"),
        ncu_row(1, READS, "8,000"),
        "==PROF== Disconnected from process 77",
    ]
)


def size(seconds: float, memory: float | None, tokens: str = "1 2 3 4") -> Size:
    return Size(64, [seconds, seconds], 9.0, memory, [tokens])


def test_times_count_the_better_way_round() -> None:
    faster = Comparison("p", "a", "b", "ms", ours=2.0, other=8.0, goal=4.0)
    assert (faster.times, faster.reached) == (4.0, True)
    more = Comparison("p", "a", "b", "RTFx", ours=8.0, other=4.0, goal=2.1, more_is_better=True)
    assert (more.times, more.reached) == (2.0, False)
    assert Comparison("p", "a", "b", "ms", 1.0, 1.0).reached is None


def test_the_sectors_of_both_kernels_are_read_from_ncus_table() -> None:
    loads, reads = compared_sectors(NCU)
    assert (loads.ours, loads.other) == (46e6, 324.864e6)
    assert loads.reached
    assert reads.times == pytest.approx(9 / 8)
    assert reads.goal is None


def test_62_percent_fewer_sectors_is_the_goal() -> None:
    for value, reached in (("123,448,320", True), ("123,448,321", False)):
        loads, _ = compared_sectors(NCU.replace("46,000,000", value))
        assert loads.reached is reached


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM", NCU.replace(READS, "other"), HEADER])
def test_what_is_no_such_table_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"no table|launches"):
        compared_sectors(text)


def test_ncu_looks_at_the_plain_kernels_and_leaves_the_clocks_alone() -> None:
    command = ncu_command("/usr/bin/ncu")
    assert command[command.index("--clock-control") + 1] == "none"
    assert command[command.index("--kernel-name") + 1] == "encoder_attention_simple"
    assert command[-1] == f"from {launch_plain.__module__} import launch_plain; launch_plain()"


def test_plain_python_and_numpy_compute_attention() -> None:
    qkv = np.random.default_rng(1).standard_normal((1, 9, 3, 6, 64)).astype(np.float32)
    wanted = reference(torch.from_numpy(qkv), 6).view(1, 9, 6, 64).transpose(1, 2).numpy()
    np.testing.assert_allclose(numpy_attention(qkv), wanted, atol=1e-5)
    query, key, value = (qkv[0, :, i, 0].tolist() for i in range(3))
    np.testing.assert_allclose(python_attention(query[:4], key, value), wanted[0, 0, :4], atol=1e-5)


def test_plain_pythons_time_grows_with_the_queries_and_heads() -> None:
    one, all_heads = (np.zeros((1, 64, 3, heads, 64), np.float32) for heads in (1, 6))
    a, b = (min(python_milliseconds(qkv, 16) for _ in range(3)) for qkv in (one, all_heads))
    assert 2 < b / a < 18  # 6, on a quiet machine


def test_precisions_are_compared_by_throughput_and_memory() -> None:
    half, single = Run("", "FP16", sizes=[size(1.0, 30.0)]), Run("", "FP32", sizes=[size(5.0, 60.0, "1 2 3 5")])
    speed, memory = compared_precision({"FP16": half, "FP32": single}, 64)
    assert speed.times == pytest.approx(5.0)
    assert speed.reached
    assert "75% of the tokens alike" in speed.what
    assert memory.times == pytest.approx(2.0)
    assert memory.reached


def test_a_precision_without_a_figure_says_why() -> None:
    half, single = Run("", "FP16", sizes=[size(1.0, 30.0)]), Run("", "FP32", error="SIGKILL")
    with pytest.raises(NotMeasured, match="SIGKILL"):
        compared_precision({"FP16": half, "FP32": single}, 64)


def test_a_cpu_has_what_needs_no_gpu() -> None:
    setting = Setting(SMALL, "cpu", windows=2, seconds=250)
    found, missing = measure(setting, account.PARTS, lambda _: None)
    assert missing.keys() == {"sectors", "python", "mapped", "buffering"}
    speed, *steps = found
    assert speed.what == "engine in FP16, 2 windows, 100% of the tokens alike"  # FP32 both, on a CPU
    assert [step.part for step in steps] == ["graphs"] * 3
    assert all(0.02 < row.times < 50 for row in found)  # the same work; beside it this machine may do other


def test_a_missed_goal_and_a_missing_part_are_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Comparison("graphs", "a step", "another", "ms", ours=1.0, other=2.0, goal=1.5)

    def status(part: Comparison | Exception) -> int:
        def measured(setting: Setting) -> list[Comparison]:
            if isinstance(part, Exception):
                raise part
            return [part]

        monkeypatch.setitem(account.PARTS, "graphs", measured)
        return account.main(["--parts", "graphs", "--device", "cpu", "--json", str(tmp_path / "out.json")])

    assert status(row) == 0
    assert json.loads((tmp_path / "out.json").read_text())["comparisons"][0]["times"] == 2.0
    assert status(Comparison("graphs", "a step", "another", "ms", 1.0, 1.0, goal=1.5)) == 1
    assert status(RuntimeError("out of memory")) == 1
    assert json.loads((tmp_path / "out.json").read_text())["missing"] == {"graphs": "RuntimeError: out of memory"}
