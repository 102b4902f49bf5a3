"""What is read: every format gives the same checkpoint, and openai-whisper takes it as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.engine.checkpoint import Dims, load

from .checkpoints import (
    ALIGNMENT_HEADS,
    TINY,
    ctranslate2_spec,
    module,
    random_tensors,
    same,
    save_ctranslate2,
    write_ctranslate2,
    write_huggingface,
    write_openai,
)

FORMATS = ("openai", "huggingface", "huggingface in shards", "ctranslate2")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write(kind: str, folder: Path, tensors: dict[str, torch.Tensor], dims: Dims = TINY) -> Path:
    match kind:
        case "openai":
            return write_openai(folder / "small.pt", tensors, dims)
        case "huggingface":
            return write_huggingface(folder / "small", tensors, dims)
        case "huggingface in shards":
            return write_huggingface(folder / "small", tensors, dims, shards=3)
        case "ctranslate2":
            return write_ctranslate2(folder / "small", tensors, dims)
    raise AssertionError(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_very_tensors_that_were_written(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=dtype)
    checkpoint = load(str(write(kind, tmp_path, tensors)))
    assert same(checkpoint.tensors, tensors)
    assert checkpoint.dims == TINY


@pytest.mark.parametrize("kind", FORMATS)
def test_openai_whisper_takes_the_tensors_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    checkpoint = load(str(write(kind, tmp_path, tensors)))
    ours, theirs = module(checkpoint.dims), module(TINY)
    ours.load_state_dict(checkpoint.tensors, strict=True)
    theirs.load_state_dict(tensors, strict=True)
    mel, tokens = torch.randn(1, TINY.n_mels, 2 * TINY.n_audio_ctx), torch.tensor([[50258, 50259, 400]])
    with torch.no_grad():
        assert torch.equal(ours(mel, tokens), theirs(mel, tokens))


@pytest.mark.parametrize("kind", FORMATS)
def test_tensors_are_contiguous_on_the_cpu(kind: str, tmp_path: Path) -> None:
    tensors = load(str(write(kind, tmp_path, random_tensors()))).tensors
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors.values())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_name_is_that_of_the_file_or_folder_and_the_source_is_kept(kind: str, tmp_path: Path) -> None:
    source = str(write(kind, tmp_path, random_tensors()))
    assert (load(source).name, load(source).source) == ("small", source)


def test_a_folder_given_as_a_dot_still_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_huggingface(tmp_path / "small", random_tensors()))
    assert load(".").name == "small"


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "openai"])
def test_alignment_heads_come_from_the_folder(kind: str, tmp_path: Path) -> None:
    assert load(str(write(kind, tmp_path, random_tensors()))).alignment_heads == ALIGNMENT_HEADS


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_alignment_heads_are_none_where_the_checkpoint_does_not_say(file: str, tmp_path: Path) -> None:
    assert load(str(write_openai(tmp_path / "small.pt", random_tensors()))).alignment_heads is None
    if file == "config.json":
        folder = write_ctranslate2(tmp_path / "small", random_tensors())
    else:
        folder = write_huggingface(tmp_path / "small", random_tensors())
    (folder / file).unlink()
    assert load(str(folder)).alignment_heads is None


@pytest.mark.parametrize(
    ("n_vocab", "n_mels", "multilingual", "languages"),
    [(51864, 80, False, 99), (51865, 80, True, 99), (51866, 128, True, 100)],
)
@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
def test_every_vocabulary_of_whisper_is_known(
    kind: str, n_vocab: int, n_mels: int, multilingual: bool, languages: int, tmp_path: Path
) -> None:
    dims = replace(TINY, n_vocab=n_vocab, n_mels=n_mels)
    found = load(str(write(kind, tmp_path, random_tensors(dims), dims))).dims
    assert found == dims
    assert (found.multilingual, found.num_languages) == (multilingual, languages)
    assert (module(dims).is_multilingual, module(dims).num_languages) == (multilingual, languages)


def test_equal_arrays_that_a_converter_made_aliases_are_found(tmp_path: Path) -> None:
    tensors = random_tensors()
    for name in tensors:
        if name.endswith("_ln.weight"):
            tensors[name] = torch.ones_like(tensors[name])
    assert same(load(str(write_ctranslate2(tmp_path / "small", tensors))).tensors, tensors)


def test_scalars_of_newer_converters_are_ignored(tmp_path: Path) -> None:
    spec = ctranslate2_spec(random_tensors())
    spec.decoder.scale_outputs = 1.0
    assert same(load(str(save_ctranslate2(tmp_path / "small", spec))).tensors, random_tensors())


def test_a_stored_output_projection_is_accepted_if_it_is_the_embedding(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    stored = load_file(folder / "model.safetensors")
    save_file(
        stored | {"proj_out.weight": stored["model.decoder.embed_tokens.weight"].clone()}, folder / "model.safetensors"
    )
    assert same(load(str(folder)).tensors, random_tensors())


def test_a_bare_huggingface_model_without_its_head_is_read(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    assert same(load(str(folder)).tensors, random_tensors())


def test_a_single_safetensors_file_goes_before_shards(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "small", random_tensors(seed=1), shards=2)
    folder = write_huggingface(tmp_path / "small", random_tensors(seed=2))
    assert same(load(str(folder)).tensors, random_tensors(seed=2))


def test_transposed_tensors_in_a_pt_file_become_contiguous(tmp_path: Path) -> None:
    tensors = random_tensors()
    turned = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    checkpoint = load(str(write_openai(tmp_path / "small.pt", turned)))
    assert all(tensor.is_contiguous() for tensor in checkpoint.tensors.values())
    assert same(checkpoint.tensors, tensors)


def test_parameters_in_a_pt_file_come_without_gradients(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in random_tensors().items()}
    checkpoint = load(str(write_openai(tmp_path / "small.pt", parameters)))
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())


def test_loading_a_file_imports_neither_whisper_nor_numba(tmp_path: Path) -> None:
    source = str(write_ctranslate2(tmp_path / "small", random_tensors()))
    program = (
        "import json, sys; from serve_app.engine.checkpoint import load; load(sys.argv[1]);"
        "print(json.dumps([name for name in ('whisper', 'numba', 'ray') if name in sys.modules]))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, source], cwd=root, env=os.environ, capture_output=True, check=True, timeout=60
    )
    assert json.loads(result.stdout) == []
