from __future__ import annotations

import importlib.util
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.audio.recording import decode
from serve_app.audio.samples import Limits
from serve_app.audio.vad import THREADS, SpeechDetector, SpeechStream
from serve_app.settings import AudioSettings
from tests.audio.make import noise, tone

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load`:DeprecationWarning")


@pytest.fixture(scope="module")
def detector() -> SpeechDetector:
    return SpeechDetector()


def probabilities(
    detector: SpeechDetector, samples: npt.NDArray[np.int16], portions: int = 1
) -> npt.NDArray[np.float32]:
    stream = detector.stream()
    parts = [stream.push(part).result() for part in np.array_split(samples, portions)]
    return np.concatenate([*parts, stream.push(np.zeros(0, np.int16), last=True).result()])


def as_silero_does(samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """silero-vad's own network, frame by frame."""
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    model = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    signal = torch.from_numpy(np.pad(samples, (0, -len(samples) % 512)).astype(np.float32) / 32768)
    with torch.inference_mode():
        return np.array([model(frame[None], 16_000).item() for frame in signal.view(-1, 512)], np.float32)


def speech(shared_audio: Path) -> npt.NDArray[np.int16]:
    with (shared_audio / "formats" / "jfk-flac_96k_24bit.flac").open("rb", buffering=0) as file:
        return np.concatenate(list(decode(file.read, Limits.of(AudioSettings()))))


def test_the_probabilities_are_silero_vads_own(detector: SpeechDetector, shared_audio: Path) -> None:
    samples = speech(shared_audio)
    ours, theirs = probabilities(detector, samples), as_silero_does(samples)
    assert theirs.max() > 0.9
    assert theirs.min() < 0.1
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("samples", [tone(2.01), noise(2.01), np.zeros(5000, np.int16), noise(0.001)])
def test_the_probabilities_are_silero_vads_own_on_what_is_not_speech(
    detector: SpeechDetector, samples: npt.NDArray[np.int16]
) -> None:
    assert np.abs(probabilities(detector, samples) - as_silero_does(samples)).max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, 40_000), portions=st.integers(1, 12))
def test_how_a_recording_is_portioned_changes_nothing(length: int, portions: int) -> None:
    samples = tone(2.5)[:length] // 2 + noise(2.5)[:length] // 16
    whole = probabilities(DETECTOR, samples)
    assert len(whole) == -(-length // 512)
    np.testing.assert_allclose(probabilities(DETECTOR, samples, portions), whole, atol=ROUNDING)


DETECTOR = SpeechDetector()
ROUNDING = 1e-5
"""Products of other sizes add up in another order: up to 1.2e-6 of a probability was seen in 150 runs."""


def test_streams_do_not_disturb_each_other(detector: SpeechDetector, shared_audio: Path) -> None:
    samples = speech(shared_audio)
    recordings = [samples, samples[::-1].copy(), np.roll(samples, 9000), noise(11)]
    alone = [probabilities(detector, recording, 20) for recording in recordings]
    together: dict[int, npt.NDArray[np.float32]] = {}
    threads = [
        threading.Thread(target=lambda i=i, r=r: together.update({i: probabilities(detector, r, 20)}))
        for i, r in enumerate(recordings)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        np.testing.assert_allclose(together[index], expected, atol=ROUNDING)


def test_portions_that_wait_at_the_same_time_are_computed_together(detector: SpeechDetector) -> None:
    portions = [noise(1), tone(1), noise(1) // 2, tone(1) // 2]
    alone = [detector.stream().push(portion).result() for portion in portions]
    started, go_on, sizes = threading.Semaphore(0), threading.Event(), []

    def before(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        sizes.append(len(arguments[0]))
        started.release()
        assert go_on.wait(60)

    with detector._network.register_forward_pre_hook(before):
        busy = [detector.stream().push(tone(2 + i)) for i in range(THREADS)]
        try:
            assert all(started.acquire(timeout=60) for _ in busy)
            together = [detector.stream().push(portion) for portion in portions]
            left, longer = detector.stream().push(noise(1)), detector.stream().push(noise(1.5))
            assert left.cancel()
        finally:
            go_on.set()
        for expected, result in zip(alone, together, strict=True):
            np.testing.assert_allclose(result.result(60), expected, atol=ROUNDING)
        assert len(longer.result(60)) == 46
        assert all(len(result.result(60)) for result in busy)
    assert sorted(sizes) == [1] * (THREADS + 1) + [len(portions)]


def test_recordings_have_their_turns_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.audio.vad.THREADS", 1)
    monkeypatch.setattr("serve_app.audio.vad.TOGETHER", 1)
    detector = SpeechDetector()
    started, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def before(*_: object) -> None:
        started.set()
        assert go_on.wait(60)

    def push(name: str, stream: SpeechStream, seconds: float) -> Future[npt.NDArray[np.float32]]:
        result = stream.push(tone(seconds))
        result.add_done_callback(lambda _: done.append(name))
        return result

    long, first, second, busy = (detector.stream() for _ in range(4))
    long.push(tone(31)).result(60)  # has had its 30 s
    with detector._network.register_forward_pre_hook(before):
        results = [push("busy", busy, 1)]
        assert started.wait(60)
        results += [push("second", second, 1), push("first", first, 1), push("long", long, 1)]
        results.append(push("third", detector.stream(), 1))
        go_on.set()
        for result in results:
            result.result(60)
    assert done == ["busy", "first", "second", "long", "third"]


def test_an_error_is_that_of_its_portions_and_the_next_are_computed(detector: SpeechDetector) -> None:
    stream = detector.stream()
    stream.state = (torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    with pytest.raises(RuntimeError):
        stream.push(tone(1)).result(60)
    assert len(detector.stream().push(tone(1)).result(60)) == 31


def test_loading_it_leaves_torchs_threads_alone() -> None:
    torch.set_num_threads(3)
    SpeechDetector()
    assert torch.get_num_threads() == 3
    assert "silero_vad" not in sys.modules
