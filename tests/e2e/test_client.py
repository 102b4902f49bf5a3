"""The Ray Python handle, from another process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
import av, numpy as np
from serve_app.client import Client
from serve_app.errors import ServiceError

path, missing = sys.argv[1:]
with av.open(path) as container:
    blocks = [f.to_ndarray().ravel() for f in container.decode(audio=0)]
    rate = container.streams.audio[0].rate
samples = np.concatenate(blocks)
client = Client()
texts = {
    "path": client.transcribe(path, language="en").text,
    "bytes": client.transcribe(open(path, "rb").read()).text,
    "int16": client.transcribe(samples, sample_rate=rate, language="en").text,
    "float32": client.transcribe(samples.astype(np.float32) / 32768, sample_rate=rate, language="en").text,
}
many = list(client.transcribe_many([path, missing, b"not audio", path], language="en"))
texts["many"] = [type(o).__name__ if isinstance(o, ServiceError) else o.text for o in many]
for bad in ({"language": "xx"}, {"temperature": 3}, {"volume": 11}):
    try:
        client.transcribe(path, **bad)
    except ServiceError as error:
        texts[json.dumps(bad)] = error.message
print(json.dumps(texts))
"""

DATASET = """
import json, sys
import ray
from serve_app.client import BatchTranscriber
ray.init(address="auto", log_to_driver=False)
paths = [{"path": sys.argv[1]}] * 3 + [{"path": "/nowhere.wav"}]
done = ray.data.from_items(paths).map_batches(
    BatchTranscriber, fn_constructor_kwargs={"column": "path", "language": "en"}, batch_size=2, concurrency=1,
)
print(json.dumps([{name: r[name] for name in ("path", "text", "error")} for r in done.take_all()]))
"""


def run(program: str, *arguments: str) -> object:
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_another_process_transcribes_paths_bytes_and_samples(application: str, sample: Path, sample_text: str) -> None:
    texts = run(PROGRAM, str(sample), "/nowhere.wav")
    assert isinstance(texts, dict)
    for kind in ("path", "bytes", "int16", "float32"):
        assert words(texts[kind]) == words(sample_text), kind
    first, missing, damaged, last = texts["many"]
    assert words(first) == words(last) == words(sample_text)
    assert (missing, damaged) == ("InvalidAudio", "InvalidAudio")
    assert "xx" in texts['{"language": "xx"}']
    assert "temperature" in texts['{"temperature": 3}']
    assert "volume" in texts['{"volume": 11}']


def test_a_dataset_is_transcribed_in_batches(application: str, sample: Path, sample_text: str) -> None:
    rows = run(DATASET, str(sample))
    assert isinstance(rows, list)
    rows.sort(key=lambda row: row["path"] != str(sample))  # Ray Data keeps no order
    *done, missing = rows
    assert [(words(row["text"]), row["error"]) for row in done] == [(words(sample_text), "")] * 3
    assert missing["text"] == ""
    assert "nowhere" in missing["error"]
