"""Real weights and real speech for the engine's tests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from serve_app.engine.checkpoint import Checkpoint, load

SAMPLE = Path(__file__).resolve().parents[2] / "serve_app" / "assets" / "sample.flac"


def read_pcm(path: Path) -> np.ndarray:
    """A recording at 16 kHz mono as int16 [n]."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("s16", "mono", 16_000)
        frames = [f for decoded in container.decode(audio=0) for f in resampler.resample(decoded)]
        return np.concatenate([frame.to_ndarray().ravel() for frame in frames])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return load("embedded:tiny.en")


@pytest.fixture(scope="session")
def base() -> Checkpoint:
    return load("embedded:base")


def reference_model(checkpoint: Checkpoint) -> Whisper:
    model = Whisper(ModelDimensions(**asdict(checkpoint.dims)))
    model.load_state_dict(checkpoint.tensors)
    return model.float().eval()


@pytest.fixture(scope="session")
def reference_tiny(tiny: Checkpoint) -> Whisper:
    return reference_model(tiny)


@pytest.fixture(scope="session")
def reference_base(base: Checkpoint) -> Whisper:
    return reference_model(base)


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """The bundled sample recording."""
    return read_pcm(SAMPLE)
