"""The Ray Python handle: transcription from any process of the Ray cluster that the application runs in.

    from serve_app.client import Client
    client = Client()                                  # joins the running cluster
    print(client.transcribe("talk.mp3", language="en").text)
    for transcript in client.transcribe_many(paths): ...

and, over a dataset, with Ray Data:

    ds.map_batches(BatchTranscriber, fn_constructor_kwargs={"column": "bytes"}, batch_size=16, concurrency=4)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray import serve
from ray.serve.handle import DeploymentResponse

from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript
from serve_app.errors import InvalidAudio, InvalidRequest, Overloaded, ServiceError

Audio = str | Path | bytes | np.ndarray[Any, Any]
"""A file's path (read by the caller), its bytes, or samples [n] or [n, channels]: float in [-1, 1], or int16."""

ATTEMPTS = 3
"""How often a recording is sent when API replicas die with it; transcription is pure."""


class Client:
    """A handle on the running application. Options are those of ``TranscribeOptions``, as keyword arguments."""

    def __init__(self, app_name: str = "whisper", *, address: str | None = "auto"):
        """Joins the Ray cluster at ``address`` unless this process belongs to one already.

        Raises ConnectionError where there is no cluster, RayServeException where the application does not run in it.
        """
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self._transcribe = serve.get_app_handle(app_name).options(method_name="transcribe")

    def transcribe(self, audio: Audio, *, sample_rate: int = 16_000, **options: Any) -> Transcript:
        """Transcribes one recording. ``sample_rate`` is that of samples; a file tells its own.

        Raises the errors of ``serve_app.errors``; waits and tries again where the application is overloaded.
        """
        return _Job(self._transcribe, audio, sample_rate, _options(options)).result()

    def transcribe_many(
        self, audios: Iterable[Audio], *, sample_rate: int = 16_000, concurrency: int = 32, **options: Any
    ) -> Iterator[Transcript | ServiceError]:
        """Transcribes many recordings, ``concurrency`` at a time, and yields what became of each, in order: a recording
        that cannot be transcribed yields its error, so that it does not end the others."""
        checked = _options({"priority": "batch", **options})
        jobs: deque[_Job] = deque()
        for audio in audios:
            if len(jobs) >= concurrency:
                yield jobs.popleft().outcome()
            jobs.append(_Job(self._transcribe, audio, sample_rate, checked))
        while jobs:
            yield jobs.popleft().outcome()


class BatchTranscriber:
    """For Ray Data's ``map_batches``: adds the columns ``text``, ``language``, ``duration`` and ``error`` to batches
    that have a column of paths, of files' bytes or of samples."""

    def __init__(self, column: str = "bytes", *, app_name: str = "whisper", sample_rate: int = 16_000, **options: Any):
        self._column, self._sample_rate, self._options = column, sample_rate, options
        _options(options)
        self._client = Client(app_name)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        if self._column not in batch:
            raise InvalidRequest(f"the batch has no column {self._column!r}; it has {sorted(batch)}")
        audios = list(batch[self._column])
        outcomes = list(
            self._client.transcribe_many(
                audios, sample_rate=self._sample_rate, concurrency=max(1, len(audios)), **self._options
            )
        )
        done = [o if isinstance(o, Transcript) else None for o in outcomes]
        return batch | {
            "text": np.array([t.text if t else "" for t in done], dtype=object),
            "language": np.array([t.language if t else "" for t in done], dtype=object),
            "duration": np.array([t.duration if t else 0.0 for t in done]),
            "error": np.array(["" if isinstance(o, Transcript) else o.message for o in outcomes], dtype=object),
        }


def _options(options: dict[str, Any]) -> TranscribeOptions:
    try:
        return TranscribeOptions(**options)
    except TypeError as error:
        raise InvalidRequest(f"unknown option: {error}") from None


class _Job:
    """One recording under way."""

    def __init__(self, handle: Any, audio: Audio, sample_rate: int, options: TranscribeOptions):
        self._handle, self._sample_rate, self._options = handle, sample_rate, options
        self._audio: bytes | np.ndarray[Any, Any] | None = None
        self._error: ServiceError | None = None
        self._response: DeploymentResponse[Any]
        try:
            self._audio = _read(audio)
        except ServiceError as error:
            self._error = error
            return
        self._send()

    def _send(self) -> None:
        self._response = self._handle.remote(self._audio, self._options, self._sample_rate)

    def outcome(self) -> Transcript | ServiceError:
        try:
            return self.result()
        except ServiceError as error:
            return error

    def result(self) -> Transcript:
        if self._error is not None:
            raise self._error
        deaths = 0
        while True:
            try:
                transcript: Transcript = self._response.result()
                return transcript
            except ray.exceptions.RayTaskError as failed:
                cause = failed.cause
                if not isinstance(cause, ServiceError):
                    raise
                if not isinstance(cause, Overloaded):
                    raise cause from None
                time.sleep(cause.retry_after_s)
            except ray.exceptions.RayActorError:
                deaths += 1
                if deaths == ATTEMPTS:
                    raise
            self._send()


def _read(audio: Audio) -> bytes | np.ndarray[Any, Any]:
    if isinstance(audio, str | Path):
        try:
            return Path(audio).read_bytes()
        except OSError as error:
            raise InvalidAudio(f"cannot read {audio}: {error.strerror}") from None
    if isinstance(audio, bytes | np.ndarray):
        return audio
    raise InvalidRequest(f"audio must be a path, bytes or a numpy array, not {type(audio).__name__}")
