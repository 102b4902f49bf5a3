"""What is refused, and that the message says what is wrong with which file."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from serve_app.engine.checkpoint import CheckpointError, load
from serve_app.engine.checkpoint.ctranslate2 import read_variables
from serve_app.engine.checkpoint.files import ByteRange
from serve_app.engine.checkpoint.form import tensor_shapes

from .checkpoints import (
    TINY,
    ctranslate2_spec,
    huggingface_config,
    memory_limit,
    random_tensors,
    same,
    save_ctranslate2,
    write_ctranslate2,
    write_huggingface,
    write_openai,
)

# Many examples on one folder: each restores what it changed.
on_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refuses(source: Path, *words: str) -> None:
    """Refused without a large allocation, in a message that names the file or folder and has these words in order."""
    with memory_limit(), pytest.raises(CheckpointError) as caught:
        load(str(source))
    message = str(caught.value)
    assert str(source) in message
    assert re.search(".*".join(map(re.escape, words)), message), message


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint in each format, by the file that holds the weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    tensors = random_tensors()
    return {
        "openai": write_openai(root / "small.pt", tensors),
        "huggingface": write_huggingface(root / "hf", tensors) / "model.safetensors",
        "ctranslate2": write_ctranslate2(root / "ct2", tensors) / "model.bin",
    }


def source_of(weights: Path) -> Path:
    return weights if weights.suffix == ".pt" else weights.parent


def changed(weights: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a sound checkpoint with other bytes; what to load."""
    target = tmp_path / weights.name
    for sibling in weights.parent.glob("*.json"):
        (tmp_path / sibling.name).write_bytes(sibling.read_bytes())
    target.write_bytes(change(weights.read_bytes()))
    return source_of(target)


# Damage anywhere


@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
@on_one_folder
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_refused(kind: str, written: dict[str, Path], data: st.DataObject) -> None:
    weights = written[kind]
    content = weights.read_bytes()
    # Half of the cuts in the first part, where the headers are.
    length = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 6000)))
    try:
        os.truncate(weights, length)
        refuses(source_of(weights))
    finally:
        weights.write_bytes(content)


@pytest.fixture(scope="module")
def header_bytes(written: dict[str, Path]) -> list[int]:
    """Where model.bin has anything but the variables' data."""
    with ByteRange([written["ctranslate2"]]) as file:
        data = [range(v.offset, v.offset + v.nbytes) for v in read_variables(file).values()]
        positions = set(range(file.size)).difference(*data)
    return sorted(positions)


@settings(on_one_folder, max_examples=120)
@given(data=st.data())
def test_a_wrong_byte_in_a_ctranslate2_header_is_refused_or_without_effect(
    written: dict[str, Path], header_bytes: list[int], data: st.DataObject
) -> None:
    """Without effect: in the name or the type of a scalar that is ignored anyway."""
    weights = written["ctranslate2"]
    content = weights.read_bytes()
    position = data.draw(st.sampled_from(header_bytes))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[position]))
    try:
        with weights.open("r+b") as file:
            file.seek(position)
            file.write(bytes([value]))
        try:
            with memory_limit():
                checkpoint = load(str(weights.parent))
        except CheckpointError:
            return
        around = content[max(0, position - 40) : position + 40]
        assert b"decoder/alibi" in around or b"scale_alibi" in around or b"decoder/alignment" in around
        assert checkpoint.dims == TINY
        assert same(checkpoint.tensors, random_tensors())
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
@settings(on_one_folder, max_examples=40)
@given(data=st.data())
def test_wrong_bytes_anywhere_are_refused_or_give_a_whisper(
    kind: str, written: dict[str, Path], data: st.DataObject
) -> None:
    weights = written[kind]
    content = weights.read_bytes()
    ends = st.one_of(
        st.integers(0, len(content) - 1), st.integers(0, 12_000), st.integers(1, 9_000).map(len(content).__sub__)
    )
    damage = data.draw(st.lists(st.tuples(ends, st.integers(0, 255)), min_size=1, max_size=4))
    damaged = bytearray(content)
    for position, value in damage:
        damaged[position] = value
    try:
        weights.write_bytes(damaged)
        try:
            with memory_limit():
                checkpoint = load(str(source_of(weights)))
        except CheckpointError:
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
        assert shapes == tensor_shapes(checkpoint.dims)
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
def test_weights_that_are_not_finite_are_named(kind: str, dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=dtype)
    tensors["decoder.token_embedding.weight"][7, 3] = value
    match kind:
        case "openai":
            refuses(write_openai(tmp_path / "small.pt", tensors), "token_embedding.weight has 1 values that are NaN")
        case "huggingface":
            refuses(write_huggingface(tmp_path / "small", tensors), "embed_tokens.weight has 1 values that are NaN")
        case _:
            refuses(write_ctranslate2(tmp_path / "small", tensors), "embeddings/weight has 1 values that are NaN")


@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
def test_an_empty_file_is_called_empty(kind: str, written: dict[str, Path], tmp_path: Path) -> None:
    refuses(changed(written[kind], tmp_path, lambda _: b""), "the file is empty")


@pytest.mark.parametrize("kind", ["openai", "huggingface", "ctranslate2"])
def test_a_git_lfs_pointer_is_recognised(kind: str, written: dict[str, Path], tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 290403936\n"
    refuses(changed(written[kind], tmp_path, lambda _: pointer), "a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_pipe_in_the_place_of_weights_does_not_block(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config()))
    os.mkfifo(tmp_path / name)
    refuses(tmp_path, name, "not a regular file")


# CTranslate2


def edit(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


CONV1_SHAPE = struct.pack("<B3I", 3, 8, 80, 3)


def test_a_file_of_another_kind_is_not_a_ctranslate2_model(written: dict[str, Path], tmp_path: Path) -> None:
    source = changed(written["ctranslate2"], tmp_path, lambda _: b"GGUF" + bytes(100))
    refuses(source, "not a CTranslate2 model", "GGUF")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\x06\0\0\0\x0c\0Whis", b"\x05\0\0\0\x0c\0Whis", ["binary version 5", "convert"]),
        (b"\x0c\0WhisperSpec\0", b"\x10\0TransformerSpec\0", ["another kind", "TransformerSpec"]),
        (b"WhisperSpec\0\x03", b"WhisperSpec\0\x02", ["revision 2", "convert"]),
        (b"decoder/num_heads\0\0\x02", b"decoder/num_heads\0\0\x04", ["decoder/num_heads is float16"]),
        (b"decoder/num_heads\0\0\x02", b"decoder/num_heads\0\0\x07", ["decoder/num_heads", "unknown data type 7"]),
        (b"decoder/num_heads\0", b"decoder/num_headz\0", ["scalar missing: decoder/num_heads"]),
        (
            b"decoder/pre_norm\0\0\x01\x01\0\0\0\x01",
            b"decoder/pre_norm\0\0\x01\x01\0\0\0\0",
            ["architecture", "pre_norm is 0"],
        ),
        (b"decoder/alibi\0\0\x01\x01\0\0\0\0", b"decoder/alibi\0\0\x01\x01\0\0\0\x01", ["architecture", "alibi"]),
        (CONV1_SHAPE, struct.pack("<B3I", 3, 8, 80, 2**31), ["damaged", "encoder/conv1/weight claims 3840 bytes"]),
        (CONV1_SHAPE, struct.pack("<B3I", 3, 8, 3, 80), ["3 mel bands"]),
        (CONV1_SHAPE, struct.pack("<B3I", 3, 80, 8, 3), ["state (80)", "(8) differ"]),
        (CONV1_SHAPE + b"\x04" + struct.pack("<I", 3840), CONV1_SHAPE + b"\x04" + b"\xff" * 4, ["conv1/weight claims"]),
        (CONV1_SHAPE + b"\x04", struct.pack("<B3I", 3, 8, 80, 3) + b"\x05", ["several types"]),
    ],
)
def test_a_ctranslate2_model_that_is_not_ours_to_read_says_why(
    old: bytes, new: bytes, words: list[str], written: dict[str, Path], tmp_path: Path
) -> None:
    refuses(changed(written["ctranslate2"], tmp_path, edit(old, new)), *words)


def test_a_huge_claim_in_a_header_costs_neither_memory_nor_time(written: dict[str, Path], tmp_path: Path) -> None:
    huge = struct.pack("<B3I", 3, 2**14, 2**14, 8) + b"\x04" + struct.pack("<I", 2**32 - 1)
    source = changed(written["ctranslate2"], tmp_path, edit(CONV1_SHAPE + b"\x04" + struct.pack("<I", 3840), huge))
    refuses(source, "damaged", "encoder/conv1/weight", str(2**32 - 1))
    near = struct.pack("<B3I", 3, 2**14, 2**14, 4) + b"\x04" + struct.pack("<I", 2**31)
    source = changed(written["ctranslate2"], tmp_path, edit(CONV1_SHAPE + b"\x04" + struct.pack("<I", 3840), near))
    refuses(source, "truncated in variable encoder/conv1/weight", f"{2**31} bytes expected", "present")


def test_a_huge_count_of_variables_is_refused_at_once(written: dict[str, Path], tmp_path: Path) -> None:
    at = len(struct.pack("<I", 6)) + 2 + len(b"WhisperSpec\0") + 4
    source = changed(written["ctranslate2"], tmp_path, lambda c: c[:at] + b"\xff" * 4 + c[at + 4 :])
    refuses(source, f"{2**32 - 1} variables")


def test_a_cut_inside_a_variable_names_it_and_counts_its_bytes(written: dict[str, Path], tmp_path: Path) -> None:
    weights = written["ctranslate2"]
    with ByteRange([weights]) as file:
        variable = read_variables(file)["encoder/conv1/weight"]
    source = changed(weights, tmp_path, lambda content: content[: variable.offset + 100])
    refuses(source, "truncated in variable encoder/conv1/weight: 3840 bytes expected, 100 present")


def test_bytes_after_the_end_are_counted(written: dict[str, Path], tmp_path: Path) -> None:
    refuses(changed(written["ctranslate2"], tmp_path, lambda content: content + bytes(5)), "5 bytes trail")


@pytest.mark.parametrize("quantization", ["int8", "int8_float16", "int16"])
def test_a_quantised_model_says_what_to_use_instead(quantization: str, tmp_path: Path) -> None:
    folder = write_ctranslate2(tmp_path / "small", random_tensors(), quantization=quantization)
    refuses(folder, f"quantised to {quantization.split('_')[0]}", "--quantization float16")


def test_a_bias_for_keys_is_not_whispers(tmp_path: Path) -> None:
    spec = ctranslate2_spec(random_tensors())
    spec.decoder.layer[1].attention.linear[1].bias[2] = 0.5
    refuses(save_ctranslate2(tmp_path / "small", spec), "decoder/layer_1/attention/linear_1/bias", "keys")


def test_an_untied_output_projection_is_not_whispers(tmp_path: Path) -> None:
    spec = ctranslate2_spec(random_tensors())
    spec.decoder.projection.weight = spec.decoder.projection.weight + 1
    refuses(save_ctranslate2(tmp_path / "small", spec), "decoder/projection/weight", "not tied")


def test_layers_that_are_not_contiguous_are_listed(written: dict[str, Path], tmp_path: Path) -> None:
    def renumber(content: bytes) -> bytes:
        return content.replace(b"decoder/layer_1/", b"decoder/layer_7/")

    refuses(changed(written["ctranslate2"], tmp_path, renumber), "decoder's layers are not contiguous: 0, 2, 7")


def test_heads_that_do_not_divide_the_state_are_refused(tmp_path: Path) -> None:
    dims = replace(TINY, n_audio_head=3)
    refuses(write_ctranslate2(tmp_path / "ct2", random_tensors(), dims), "3 audio heads do not divide a state of 8")
    refuses(write_huggingface(tmp_path / "hf", random_tensors(), dims), "3 audio heads do not divide a state of 8")
    refuses(write_openai(tmp_path / "x.pt", random_tensors(), dims), "3 audio heads do not divide a state of 8")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = random_tensors() | {"decoder.ln.weight": torch.ones(9, dtype=torch.float16)}
    refuses(write_ctranslate2(tmp_path / "ct2", tensors), "decoder/layer_norm/gamma has shape (9,)", "(8,)")
    refuses(write_huggingface(tmp_path / "hf", tensors), "model.decoder.layer_norm.weight has shape (9,)", "(8,)")
    refuses(write_openai(tmp_path / "small.pt", tensors), "decoder.ln.weight has shape (9,)", "(8,)")


def test_aliases_in_bulk_cannot_fill_the_memory(tmp_path: Path) -> None:
    """250 layers that are all aliases of one: a small file that would ask for a large model."""
    dims = replace(TINY, n_audio_state=64, n_text_state=64)
    weights = write_ctranslate2(tmp_path / "small", random_tensors(dims), dims) / "model.bin"
    with ByteRange([weights]) as file:
        names = [name for name in read_variables(file) if name.startswith("decoder/layer_2/")]

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    sound = struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    aliases = [(name.replace("layer_2", f"layer_{i}"), name) for i in range(3, 253) for name in names]
    forged = struct.pack("<I", 1 + len(aliases)) + sound[4:]
    content = weights.read_bytes()
    assert content.endswith(sound)
    forged += b"".join(string(alias) + string(target) for alias, target in aliases)
    weights.write_bytes(content.removesuffix(sound) + forged)
    refuses(weights.parent, "its tensors would take")


@pytest.mark.parametrize(
    ("heads", "words"),
    [([[3, 0]], ["alignment_heads has [3, 0]"]), ([[0, 1, 2]], ["alignment_heads has"]), ("all", ["not a list"])],
)
def test_alignment_heads_outside_the_decoder_are_refused(heads: object, words: list[str], tmp_path: Path) -> None:
    folder = write_ctranslate2(tmp_path / "ct2", random_tensors())
    (folder / "config.json").write_text(json.dumps({"alignment_heads": heads}))
    refuses(folder, "config.json", *words)


# Hugging Face


def test_a_huggingface_folder_of_another_model_is_not_whisper(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refuses(folder, "config.json", "not a Whisper: model_type is 'bert'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["config.json", "not JSON"]),
        ("[" * 100_000, ["config.json", "not JSON"]),
        ("[]", ["config.json", "not a JSON object"]),
        ('{"model_type": "whisper"}', ["config.json", "lack n_mels", "more"]),
    ],
)
def test_a_damaged_config_is_named(content: str, words: list[str], tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    (folder / "config.json").write_text(content)
    refuses(folder, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder_layers": 10**9}, ["n_audio_layer is 1000000000"]),
        ({"d_model": -8}, ["n_audio_state is -8"]),
        ({"d_model": "8"}, ["n_audio_state is '8'"]),
        ({"decoder_layers": True}, ["n_text_layer is True"]),
        ({"vocab_size": 51_870}, ["vocabulary of 51870", "51865"]),
        ({"num_mel_bins": 64}, ["64 mel bands"]),
        ({"decoder_layers": 4}, ["tensors missing: model.decoder.layers.3", "more"]),
        ({"decoder_layers": 2}, ["tensors that no Whisper of these dimensions has: model.decoder.layers.2"]),
        ({"max_source_positions": 7}, ["embed_positions.weight has shape (6, 8)", "(7, 8)"]),
        ({"activation_function": "relu"}, ["architecture", "relu"]),
        ({"scale_embedding": True}, ["architecture", "scale_embedding"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantised"]),
    ],
)
def test_a_config_that_does_not_fit_says_where(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    (folder / "config.json").write_text(json.dumps(huggingface_config() | change))
    refuses(folder, *words)


def test_a_folder_without_its_config_says_so(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    (folder / "config.json").unlink()
    refuses(folder, "config.json", "no such file")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuses(folder, "model-00002-of-00003.safetensors, which is missing")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "weights.bin", ""])
def test_an_index_cannot_reach_outside_its_folder(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = write_huggingface(tmp_path / "small", random_tensors(), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refuses(folder, "is not the name of a safetensors file in this folder")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors(), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(first | load_file(second), second)
    refuses(folder, "model-00002", "occurs twice")


def test_an_untied_head_of_a_huggingface_model_is_refused(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "small", random_tensors())
    stored = load_file(folder / "model.safetensors")
    head = stored["model.decoder.embed_tokens.weight"] + 1
    save_file(stored | {"proj_out.weight": head}, folder / "model.safetensors")
    refuses(folder, "proj_out.weight", "not tied")


def test_integer_weights_in_safetensors_are_called_quantised(tmp_path: Path) -> None:
    tensors = random_tensors() | {"encoder.conv1.weight": torch.ones(8, 80, 3, dtype=torch.int8)}
    refuses(write_huggingface(tmp_path / "small", tensors), "encoder.conv1.weight is stored as I8", "quantised")


def test_a_cut_safetensors_file_names_the_tensor(written: dict[str, Path], tmp_path: Path) -> None:
    source = changed(written["huggingface"], tmp_path, lambda content: content[:-10])
    refuses(source, "truncated in tensor model.", "bytes of data expected", "present")


def test_a_folder_with_pickled_weights_asks_for_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refuses(tmp_path, "pytorch_model.bin", "safetensors")


def test_a_folder_with_two_formats_is_ambiguous(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "small", random_tensors())
    refuses(write_ctranslate2(tmp_path / "small", random_tensors()), "a CTranslate2 and a Hugging Face model")


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    refuses(tmp_path, "neither model.bin nor model.safetensors")


# OpenAI


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


class Harmful:
    """A pickle that leaves a file behind when it is run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_is_never_run(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "harm done"
    content = {"dims": asdict(TINY), "model_state_dict": random_tensors(), "x": Harmful(mark)}
    torch.save(content, tmp_path / "small.pt", _use_new_zipfile_serialization=not legacy)
    refuses(tmp_path / "small.pt", "not an OpenAI Whisper checkpoint" if legacy else "names posix.mkdir")
    assert not mark.exists()


def test_a_pickle_that_only_asks_for_memory_is_refused(tmp_path: Path) -> None:
    pickle = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."
    with zipfile.ZipFile(tmp_path / "small.pt", "w") as archive:
        archive.writestr("small/data.pkl", pickle)
        archive.writestr("small/version", "3\n")
    refuses(tmp_path / "small.pt", "builtins.bytearray")


def test_a_pickled_module_is_a_pickle_of_something_else(tmp_path: Path) -> None:
    refuses(saved(tmp_path / "x.pt", torch.nn.Linear(2, 2)), "a pickle of something else: it names torch.nn.modules")


def test_a_state_dict_alone_is_not_an_openai_checkpoint(tmp_path: Path) -> None:
    refuses(
        saved(tmp_path / "x.pt", random_tensors()), "not an OpenAI Whisper checkpoint", "encoder.positional_embedding"
    )
    refuses(saved(tmp_path / "x.pt", torch.ones(3)), "not an OpenAI Whisper checkpoint", "Tensor")
    refuses(saved(tmp_path / "x.pt", {"dims": 1, "model_state_dict": 2}), "not a dict")


def test_torchscript_is_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for record in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"x/{record}", b"\x80\x02).")
    refuses(tmp_path / "x.pt", "a TorchScript module")


def test_a_zip_of_something_else_is_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuses(tmp_path / "x.pt", "a zip archive of readme.txt")


def test_a_cut_pt_file_is_called_truncated(written: dict[str, Path], tmp_path: Path) -> None:
    refuses(changed(written["openai"], tmp_path, lambda content: content[: len(content) // 2]), "truncated or damaged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_a_pt_file_of_other_types_says_which(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors() | {"decoder.ln.bias": torch.ones(8, dtype=dtype)}
    refuses(write_openai(tmp_path / "x.pt", tensors), "decoder.ln.bias is stored as", str(dtype).removeprefix("torch."))


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    refuses(write_openai(tmp_path / "x.pt", tensors | {"extra": torch.ones(1)}), "dimensions has: extra")
    del tensors["encoder.ln_post.bias"]
    refuses(write_openai(tmp_path / "x.pt", tensors), "tensors missing: encoder.ln_post.bias")


def test_dims_without_a_size_are_refused(tmp_path: Path) -> None:
    stated = {name: size for name, size in asdict(TINY).items() if name != "n_vocab"}
    content = {"dims": stated, "model_state_dict": random_tensors()}
    refuses(saved(tmp_path / "x.pt", content), "dimensions lack n_vocab")


def test_encoder_and_decoder_of_different_width_are_refused(tmp_path: Path) -> None:
    refuses(write_openai(tmp_path / "x.pt", random_tensors(), replace(TINY, n_text_state=12)), "(8)", "(12) differ")


def test_tensors_unfolded_from_a_few_bytes_are_refused(tmp_path: Path) -> None:
    """With strides of 0 a file of some kilobytes would claim gigabytes."""
    dims = replace(TINY, n_audio_state=4096, n_text_state=4096)
    zero = torch.zeros(1, dtype=torch.float16)
    tensors = {name: zero.expand(shape) for name, shape in tensor_shapes(dims).items()}
    path = write_openai(tmp_path / "x.pt", tensors, dims)
    assert path.stat().st_size < 2**20
    refuses(path, "its tensors would take", "more than the file has")
