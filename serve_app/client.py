"""The Ray Python handle: transcription from any process of the Ray cluster that the application runs in.

    from serve_app.client import Client
    client = Client()                                  # joins the running cluster
    print(client.transcribe("talk.mp3", language="en").text)
    for transcript in client.transcribe_many(paths): ...

and, over a dataset, with Ray Data:

    ds.map_batches(BatchTranscriber, fn_constructor_kwargs={"column": "bytes"}, batch_size=16, concurrency=4)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError

from serve_app.engine.options import TranscribeOptions
from serve_app.engine.transcript import Transcript
from serve_app.errors import InvalidAudio, InvalidRequest, Overloaded, ServiceError

Audio = str | Path | bytes | np.ndarray[Any, Any]
"""A file's path (read by the caller), its bytes, or samples [n] or [n, channels]: float in [-1, 1], or int16."""

ATTEMPTS = 3
"""How often a recording is sent when API replicas die with it; transcription is pure."""

FULL_PAUSE_S = 1.0
"""After so long a recording is sent again for which the replicas' queues had no room."""

AHEAD = 64
"""So many times as many recordings as may be under way can be done before one that came earlier is: its outcome comes
first, and theirs are kept."""


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
        job = self._start(audio, sample_rate, _options(options))
        try:
            return job.result()
        finally:
            job.cancel()  # where the wait was interrupted

    def transcribe_many(
        self, audios: Iterable[Audio], *, sample_rate: int = 16_000, concurrency: int = 32, **options: Any
    ) -> Generator[Transcript | ServiceError]:
        """Transcribes many recordings, ``concurrency`` at a time, and yields what became of each, in order: a recording
        that cannot be transcribed yields its error, so that it does not end the others, and one that takes long does
        not keep later ones from being sent. Closing the iterator ends those under way."""
        if concurrency < 1:
            raise InvalidRequest(f"concurrency must be at least 1, got {concurrency}", param="concurrency")
        return self._outcomes(audios, sample_rate, concurrency, _options({"priority": "batch", **options}))

    def _outcomes(
        self, audios: Iterable[Audio], sample_rate: int, concurrency: int, options: TranscribeOptions
    ) -> Generator[Transcript | ServiceError]:
        room = threading.Semaphore(concurrency)
        jobs: deque[_Job] = deque()
        try:
            for audio in audios:
                while jobs and (jobs[0].done() or len(jobs) >= AHEAD * concurrency):
                    yield _outcome(jobs.popleft())
                room.acquire()
                job = self._start(audio, sample_rate, options)
                job.add_done_callback(lambda _: room.release())
                jobs.append(job)
            while jobs:
                yield _outcome(jobs.popleft())
        finally:
            for job in jobs:
                job.cancel()

    def _start(self, audio: Audio, sample_rate: int, options: TranscribeOptions) -> _Job:
        return asyncio.run_coroutine_threadsafe(
            _transcribed(self._transcribe, audio, sample_rate, options), _event_loop()
        )


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


_Job = concurrent.futures.Future[Transcript]


def _outcome(job: _Job) -> Transcript | ServiceError:
    try:
        return job.result()
    except ServiceError as error:
        return error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Of all of this process's jobs, on a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="transcription", daemon=True).start()
    return loop


async def _transcribed(handle: Any, audio: Audio, sample_rate: int, options: TranscribeOptions) -> Transcript:
    """Sends a recording until it is answered. Cancelling it frees its place wherever it is."""
    content = await asyncio.to_thread(_read, audio) if isinstance(audio, str | Path) else _read(audio)
    deaths = 0
    while True:
        response = handle.remote(content, options, sample_rate)
        try:
            transcript: Transcript = await response
            return transcript
        except asyncio.CancelledError:
            response.cancel()
            raise
        except ray.exceptions.RayTaskError as failed:
            cause = failed.cause
            if not isinstance(cause, ServiceError):
                raise
            if not isinstance(cause, Overloaded):
                raise cause from None
            await asyncio.sleep(cause.retry_after_s)
        except BackPressureError:  # it did not come as far as a replica
            await asyncio.sleep(FULL_PAUSE_S)
        except ray.exceptions.RayActorError:
            deaths += 1
            if deaths == ATTEMPTS:
                raise


def _read(audio: Audio) -> bytes | np.ndarray[Any, Any]:
    if isinstance(audio, str | Path):
        try:
            return Path(audio).read_bytes()
        except OSError as error:
            raise InvalidAudio(f"cannot read {audio}: {error.strerror}") from None
    if isinstance(audio, bytes | np.ndarray):
        return audio
    raise InvalidRequest(f"audio must be a path, bytes or a numpy array, not {type(audio).__name__}")
