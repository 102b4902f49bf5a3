from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from loadtest.gpu import clients, serving
from loadtest.gpu.clients import Answer, Load, Outcome
from loadtest.gpu.run import Size
from loadtest.gpu.serving import (
    PARTS,
    Measured,
    MeasurementFailed,
    measured,
    part_of,
    ratio_of,
    speakable_weights,
    speech_windows,
    steady_rtfx,
    write_checkpoint,
)
from loadtest.gpu.work import NEW_TOKENS, random_weights
from serve_app.audio.vad import SpeechDetector
from serve_app.audio.windows import WindowCutter
from serve_app.engine.checkpoint import load
from serve_app.engine.encoder import Encoder
from serve_app.engine.features import LogMel
from serve_app.engine.options import DecodeOptions
from serve_app.engine.precision import Compute
from serve_app.engine.rules import rules_of
from serve_app.engine.slots import SlotDecoder, SlotTask
from serve_app.engine.tokens import Tokens
from serve_app.settings import VadSettings
from tests.loadtest.answering import answering
from tests.loadtest.gpu_systems import SMALL

NOTHING = dict.fromkeys(PARTS, 0.0)

PROGRAM = """
import sys
from loadtest.gpu import serving
from tests.loadtest.gpu_systems import SMALL

if __name__ == "__main__":
    sys.exit(serving.main(sys.argv[1:], {"turbo": SMALL}))
"""


def test_every_recording_is_one_window_with_speech() -> None:
    windows = speech_windows(3)
    assert windows.shape == (3, 480_000)
    assert not np.array_equal(windows[0], windows[1])
    for samples in windows:
        cutter = WindowCutter(VadSettings())
        stream = SpeechDetector().stream()
        rest = np.zeros(0, np.int16)
        found = cutter.push(samples, stream.push(samples).result())
        found += cutter.finish(stream.push(rest, last=True).result())
        assert [len(window.samples) for window in found] == [480_000]


def test_the_weights_end_no_window_and_pass_every_check(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    write_checkpoint(SMALL, path)
    checkpoint, compute = load(str(path)), Compute.resolve("cpu", "float32")
    assert checkpoint.dims == SMALL
    states = Encoder(checkpoint, compute)(LogMel(SMALL.n_mels, compute)(list(speech_windows(2))))
    rules = rules_of(Tokens(SMALL).vocabulary, SMALL, NEW_TOKENS)
    decoder = SlotDecoder(checkpoint, compute, 2, rules)
    options = DecodeOptions(language="en", temperatures=(0.0, 1.0))
    decoder.admit([SlotTask(str(i), state, options) for i, state in enumerate(states)])
    done = {}
    while decoder.active:
        done.update(decoder.step())
    for window in done.values():
        assert (len(window.tokens), window.temperature) == (NEW_TOKENS, 0.0)
        assert window.is_acceptable
        assert not window.is_silence


def test_only_what_makes_text_sure_and_various_differs_from_the_engines_weights() -> None:
    ours, theirs = speakable_weights(SMALL), random_weights(SMALL, torch.device("cpu"), torch.float16)
    different = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert different == {"decoder.ln.weight", "decoder.ln.bias", "decoder.positional_embedding"}


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("ray::ServeReplica:whisper:api", "api"),
        ("ray::ServeReplica:whisper:encoder.handle_request_with_rejection", "encoder"),
        ("ray::ServeReplica:whisper:decoder", "decoder"),
        ("ray::ServeReplica:whisper:features", "features"),
        ("/usr/bin/python -P -m serve_app.audio.sandbox 73 {}", "audio decoding"),
        ("ray::ProxyActor", "Serve's proxy"),
        ("ray::ServeController.listen_for_change", "Ray besides"),
        ("/venv/lib/python3.11/site-packages/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray", "Ray besides"),
        ("/venv/bin/python -u /venv/lib/python3.11/site-packages/ray/_private/log_monitor.py", "Ray besides"),
        ("python -m loadtest.gpu.serving --json /tmp/ray/out.json", "the clients here"),
        ("", "the clients here"),
    ],
)
def test_a_process_belongs_to_the_part_that_its_title_tells(title: str, part: str) -> None:
    assert part_of(title) == part


def test_windows_that_took_other_work_are_counted() -> None:
    answers = [Answer(NEW_TOKENS), Answer(NEW_TOKENS - 1), Answer(NEW_TOKENS, 0.2), Answer(NEW_TOKENS)]
    one = measured("handle", Outcome(answers, 4.0, NOTHING, NOTHING | {"decoder": 6.0}), 1)
    assert one.other_work == 2
    assert one.rtfx == 30.0
    assert one.an_hour("decoder") == 180.0
    assert one.cores("decoder") == 1.5


def test_a_window_without_text_ends_the_measurement() -> None:
    with pytest.raises(MeasurementFailed, match="1 of 2 windows failed: overloaded"):
        measured("http", Outcome([Answer(128), Answer(error="overloaded")], 1.0, NOTHING, NOTHING), 1)


def test_the_steady_rate_leaves_the_beginning_and_the_end_out() -> None:
    # slow at first, ten a second from the third on, slow at the end
    answers = [Answer(at=at) for at in (5.0, 9.0, *(10 + i / 10 for i in range(21)), 20.0, 30.0)]
    assert steady_rtfx(answers, 2) == pytest.approx(300.0)
    assert steady_rtfx(answers[:6], 2) is None  # as few as that are no measure


def test_the_ratio_is_of_the_handle_to_the_engine() -> None:
    engine = Size(4, [2.0], 1.0, None, [])  # 60 times real time
    ways = [Measured("http", 4, 8.0, 0, NOTHING), Measured("handle", 4, 2.5, 0, NOTHING)]
    assert ratio_of(ways, engine) == pytest.approx(0.8)
    assert ratio_of([*ways[:1], replace(ways[1], steady_rtfx=54.0)], engine) == pytest.approx(0.9)
    assert ratio_of(ways[:1], engine) is None
    assert ratio_of(ways, None) is None


def test_voice_activity_takes_time() -> None:
    assert 0 < serving.voice_activity_seconds(speech_windows(1)) < 600


def test_wav_files_hold_the_samples() -> None:
    samples = speech_windows(1)[0][:5000]
    with av.open(io.BytesIO(clients.wav(samples))) as container:
        assert container.streams.audio[0].rate == 16_000
        assert np.array_equal(np.concatenate([f.to_ndarray().ravel() for f in container.decode(audio=0)]), samples)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    path = tmp_path / "recordings.npy"
    np.save(path, np.zeros((2, 1600), np.int16))
    return path


def test_clients_send_all_windows_when_all_are_ready(recordings: Path) -> None:
    segments = [{"tokens": [1, 2], "temperature": 0.0}, {"tokens": [3], "temperature": 0.4}]
    with answering(lambda name, body: (200, {"segments": segments})) as url:
        outcome = clients.run(Load("http", url, "", recordings, 5, 4, 2), lambda: "looked")
    assert outcome.answers == [Answer(3, 0.4)] * 5
    assert (outcome.before, outcome.after) == ("looked", "looked")
    assert outcome.wall_s > 0


def test_a_client_that_fails_at_first_says_why(recordings: Path) -> None:
    with answering(lambda name, body: (503, {})) as url, pytest.raises(RuntimeError, match="at first: status 503"):
        clients.run(Load("http", url, "", recordings, 4, 2, 2), lambda: None)


@pytest.mark.timeout(900)
def test_the_application_does_the_engines_work_through_the_handle_and_over_http(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    options = "--model turbo --device cpu --windows 4 --concurrency 4 --clients 1 --api-replicas 1"
    command = [sys.executable, "-c", PROGRAM, *options.split(), "--json", str(out)]
    environment = os.environ | {"RAY_SERVE_LOG_CLIENT_ADDRESS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert out.exists(), done.stderr[-3000:]
    raw = json.loads(out.read_text())
    assert raw["engine"]["rtfx"] > 0
    assert [way["way"] for way in raw["ways"]] == ["handle", "http"], done.stderr[-3000:]
    for way in raw["ways"]:
        assert (way["windows"], way["other_work"]) == (4, 0)
        assert way["cpu_s"]["decoder"] > 0
        assert way["cpu_s"]["api"] > 0
    handle, http = (way["cpu_s"] for way in raw["ways"])
    assert handle["Serve's proxy"] < http["Serve's proxy"]
    assert raw["settings"]["decoder"]["max_tokens"] == NEW_TOKENS
    assert raw["serve"]["RAY_SERVE_LOG_CLIENT_ADDRESS"] == "0"
    assert raw["ratio"] > 0
    assert "other work" in done.stdout
    assert "of it voice activity" in done.stdout
    assert done.returncode == (0 if raw["ratio"] >= serving.GOAL else 1)
