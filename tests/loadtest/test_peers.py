from __future__ import annotations

from pathlib import Path

import pytest
from faster_whisper import WhisperModel

from loadtest import peers


@pytest.mark.parametrize("source", ["embedded:tiny.en", "embedded:base"])
def test_the_embedded_models_are_folders_that_faster_whisper_reads(source: str) -> None:
    with peers.ct2_folder(source) as folder:
        model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)
    assert model.model.is_multilingual == (source == "embedded:base")


def test_a_folder_of_weights_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with peers.ct2_folder(str(tmp_path)) as folder:
        assert folder == tmp_path


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CTranslate2 folders"), peers.ct2_folder(str(tmp_path)):
        pytest.fail("there are no weights")
