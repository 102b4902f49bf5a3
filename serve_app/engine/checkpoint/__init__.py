"""Checkpoints: Whisper's weights from any of the files they come in, in one internal form."""

from __future__ import annotations

import errno
from pathlib import Path

from . import ctranslate2, embedded, huggingface, openai
from .form import Checkpoint, CheckpointError, Dims

__all__ = ["Checkpoint", "CheckpointError", "Dims", "load"]

EMBEDDED_PREFIX = "embedded:"
ACCEPTED = (
    "embedded:base or embedded:tiny.en; the path of an OpenAI .pt file, of a Hugging Face folder (config.json and "
    "model.safetensors) or of a CTranslate2 folder (model.bin); or one of openai-whisper's model names"
)


def load(source: str) -> Checkpoint:
    """The checkpoint that ``source`` names (``ModelSettings.source``). The first that fits decides:

    1. it starts with ``embedded:``: a model from an installed package;
    2. a file or folder of that path exists: that, by its content (a file named as a model hides that model);
    3. it is one of openai-whisper's model names: downloaded, or found in its download folder.

    Raises CheckpointError for everything else, and for a checkpoint that is damaged, unknown or not Whisper's.
    """
    try:
        if source.startswith(EMBEDDED_PREFIX):
            return embedded.load(source.removeprefix(EMBEDDED_PREFIX), source)
        path = _existing(source)
        if path is not None:
            return _load_folder(path, source) if path.is_dir() else _load_file(path, source)
        return _load_named(source)
    except OSError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _existing(source: str) -> Path | None:
    if not source:
        return None
    try:
        path = Path(source).expanduser()
        return path.absolute() if path.exists() else None
    except (RuntimeError, ValueError):
        return None  # the home of an unknown user, or a NUL: no path at all
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def _load_folder(folder: Path, source: str) -> Checkpoint:
    name = folder.resolve().name
    has = {file: (folder / file).exists() for file in ("model.bin", huggingface.WEIGHTS, huggingface.INDEX)}
    safetensors = has[huggingface.WEIGHTS] or has[huggingface.INDEX]
    if has["model.bin"] and safetensors:
        raise CheckpointError(f"{folder}: holds a CTranslate2 and a Hugging Face model; keep each in its own folder")
    if has["model.bin"]:
        return ctranslate2.load(folder, name, source)
    if safetensors:
        return huggingface.load(folder, name, source)
    if (folder / "pytorch_model.bin").exists():
        raise CheckpointError(f"{folder}: holds pickled weights (pytorch_model.bin); save the model as safetensors")
    raise CheckpointError(f"{folder}: no checkpoint in this folder: neither model.bin nor model.safetensors")


def _load_file(path: Path, source: str) -> Checkpoint:
    if path.name == "model.bin" or path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: a single file of a checkpoint; name its folder, {path.parent}")
    return openai.load(path, path.stem, source)


def _load_named(source: str) -> Checkpoint:
    import whisper  # takes 1.5 s: it imports numba

    if source in whisper.available_models():
        return openai.load_named(source, source)
    raise CheckpointError(
        f"{source!r:.200} is neither an existing path nor a known model. Accepted: {ACCEPTED} "
        f"({', '.join(whisper.available_models())})"
    )
