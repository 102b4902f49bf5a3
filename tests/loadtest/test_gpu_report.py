from __future__ import annotations

import json

from rich.console import Console

from loadtest.gpu import report
from loadtest.gpu.run import Run, Size


def size(batch: int, seconds: float, tokens: str = "1 2 3 4") -> Size:
    return Size(batch, [seconds], 1.0, 10.0, [tokens])


def test_rtfx_is_seconds_of_audio_per_second_at_the_median() -> None:
    assert Size(64, [1.0, 9.0, 2.0], 0.0, None, []).rtfx == 64 * 30 / 2.0


def test_the_table_has_latency_throughput_and_the_best_batch() -> None:
    runs = [
        Run("turbo", "openai", "openai-whisper", 1.0, [size(1, 0.4), size(64, 2.0), size(128, 3.0), size(256, 9.0)]),
        Run("turbo", "broken", "broken", left_out={64: "out of memory"}, error="SIGSEGV"),
    ]
    console = Console(width=200, record=True)
    console.print(report.table("turbo", runs))
    text = console.export_text()
    assert [cell.strip() for cell in next(line for line in text.splitlines() if "openai-whisper" in line).split("│")][
        1:5
    ] == ["openai-whisper", "0.400", "960", "1,280 (128)"]
    assert "64: out of memory; SIGSEGV" in text


def test_tokens_are_compared_place_by_place_at_the_sizes_both_have() -> None:
    a = [size(1, 1.0, "1 2 3 4"), size(8, 1.0, "1 2 3 4"), size(64, 1.0, "9 9 9 9")]
    b = [size(1, 1.0, "1 2 3 4"), size(8, 1.0, "1 9 9 4")]
    assert report.alike(a, b) == 0.75
    assert report.alike(a, []) is None


def test_the_raw_figures_are_json_with_rtfx() -> None:
    run = Run("turbo", "openai", "openai-whisper", 1.0, [size(64, 2.0)], {128: "out of memory"})
    raw = json.loads(json.dumps(report.raw([run])))
    assert raw["work"]["new_tokens"] == 128
    assert raw["runs"][0]["sizes"][0]["rtfx"] == 960.0
    assert raw["runs"][0]["left_out"] == {"128": "out of memory"}
