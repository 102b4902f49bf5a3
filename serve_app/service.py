"""One recording's way through the stages: windows → features → encoder → decoder → transcript."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from ray.serve.handle import DeploymentHandle

from serve_app import metrics
from serve_app.audio import wav
from serve_app.audio.decode import AudioDecoder
from serve_app.audio.pipeline import Windows
from serve_app.audio.samples import pcm
from serve_app.audio.vad import SpeechDetector
from serve_app.audio.windows import Window
from serve_app.batching.handle import BatchingHandle
from serve_app.batching.messages import InputLost, StageWindow
from serve_app.engine.constants import SAMPLE_RATE, WINDOW_SAMPLES
from serve_app.engine.fallback import MAX_NO_SPEECH_PROB, DecodedWindow, is_sparse
from serve_app.engine.memory import MOST_WINDOWS
from serve_app.engine.options import DecodeOptions, TranscribeOptions
from serve_app.engine.tokens import Tokens
from serve_app.engine.transcript import Segment, Transcript, assemble, window_segments
from serve_app.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServiceError, TranscriptionFailed
from serve_app.scaling.readings import CallerReading
from serve_app.scaling.signals import PERIOD_S, Arrivals
from serve_app.settings import Settings
from serve_app.stages.decoder import ModelInfo
from serve_app.stages.observed import replica_name
from serve_app.stages.ring import RingDescriptor
from serve_app.stages.transport import Sent

logger = logging.getLogger(__name__)

INPUT_LOSSES = 3
"""How often a window is taken through the stages again because a replica died with what it had made."""


LITTLE_SPEECH_S = 1.0


class Transcriber:
    """Takes recordings through the stages; one in each API replica. Belongs to one event loop."""

    def __init__(self, settings: Settings, stages: dict[str, DeploymentHandle[Any]], model: ModelInfo):
        self._settings = settings
        self._features = BatchingHandle(
            stages["features"], credit=2 * max(1, settings.features.budget_samples // WINDOW_SAMPLES)
        )
        self._encoder = BatchingHandle(stages["encoder"], credit=2 * (settings.encoder.budget_windows or MOST_WINDOWS))
        self._decoder = BatchingHandle(stages["decoder"], credit=model.slots + max(1, model.slots // 2))
        self._stages = {"features": self._features, "encoder": self._encoder, "decoder": self._decoder}
        self._observing: asyncio.Task[None] | None = None
        self.tokens = Tokens(model.dims)
        self._audio = AudioDecoder(settings.audio)
        self._detector = SpeechDetector()
        self._arrivals = Arrivals()
        self._active = 0
        self._mean_seconds = 1.0  # of a request, recently
        self.model_name = settings.model.served_name or model.name
        self.languages = frozenset(self.tokens.vocabulary.languages or {"en"})
        self.created = int(time.time())

    async def start(self) -> None:
        await self._audio.start()
        self._observing = asyncio.create_task(self._observe())

    async def close(self) -> None:
        if self._observing is not None:
            self._observing.cancel()
        await self._audio.close()

    async def ready(self) -> dict[str, bool]:
        """By stage: is a replica of it up?"""
        return {name: handle.ready for name, handle in self._stages.items()}

    def reading(self) -> CallerReading:
        """What waits here, for the autoscaling policy."""
        queues = {name: handle.waiting() for name, handle in self._stages.items()}
        values: dict[str, Any] = {}
        for name, queue in queues.items():
            values[f"{name}_windows"], values[f"{name}_s"] = queue.windows, queue.seconds
            values[f"{name}_oldest_wait_s"] = queue.oldest_wait_s
        return CallerReading(at=time.time(), active=self._active, arrived_s=self._arrivals.last_second(), **values)

    async def _observe(self) -> None:
        """Sets this replica's gauges once a second, for ever."""
        replica = replica_name()
        metrics.start_caller(self._stages)
        while True:
            metrics.REQUESTS_ACTIVE.set(self._active, replica=replica)
            for name, handle in self._stages.items():
                queue = handle.waiting()
                metrics.CREDIT_QUEUE.set(queue.windows, stage=name, replica=replica)
                metrics.CREDIT_QUEUE_AUDIO.set(queue.seconds, stage=name, replica=replica)
                metrics.CREDIT_OLDEST_WAIT.set(queue.oldest_wait_s, stage=name, replica=replica)
            metrics.CALLER_ARRIVED.set(self._arrivals.last_second(), replica=replica)
            metrics.CALLER_TIME.set(time.time(), replica=replica)
            await asyncio.sleep(PERIOD_S)

    async def transcribe(
        self, audio: bytes | BinaryIO | np.ndarray[Any, Any], options: TranscribeOptions, *, sample_rate: int = 16_000
    ) -> Transcript:
        """Transcribes a recording: a file's bytes, a file, or samples at ``sample_rate``.

        Raises the errors of ``serve_app.errors``. Cancelling it frees its work in every stage.
        """
        began = time.monotonic()
        outcome = "failed"
        try:
            transcript = await self._admitted(audio, options, sample_rate)
            outcome = "done"
        except ServiceError as error:
            outcome = _outcome(error)
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            metrics.REQUESTS.add(outcome=outcome)
        seconds = time.monotonic() - began
        metrics.REQUEST_SECONDS.observe(seconds)
        metrics.REQUEST_SPEED.observe(transcript.duration / max(seconds, 1e-6))
        metrics.REQUEST_AUDIO.add(transcript.duration)
        return transcript

    async def _admitted(
        self, audio: bytes | BinaryIO | np.ndarray[Any, Any], options: TranscribeOptions, sample_rate: int
    ) -> Transcript:
        self._check(options)
        with self._admission():
            timeout = min(options.timeout_s or self._settings.request.timeout_s, self._settings.request.timeout_s)
            try:
                async with asyncio.timeout(timeout):
                    blocks = await self._blocks(audio, sample_rate)
                    return await self._transcribe(blocks, options, time.time() + timeout)
            except TimeoutError:
                raise DeadlineExceeded(f"the recording was not transcribed within {timeout:g} s") from None

    def _check(self, options: TranscribeOptions) -> None:
        if options.language is not None and options.language not in self.languages:
            raise InvalidRequest(f"the model does not know the language {options.language!r}", param="language")
        if options.task == "translate" and len(self.languages) == 1:
            raise InvalidRequest("the model is English-only and cannot translate", param="task")

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """Refuses work beyond the bound; measures how long requests take, for the advice when to come back."""
        bound = self._settings.request.max_active
        if self._active >= bound:
            wait = max(1.0, self._mean_seconds / bound)
            raise Overloaded(f"{bound} recordings are being transcribed; try again later", retry_after_s=wait)
        self._active += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._active -= 1
            self._mean_seconds += 0.1 * (time.monotonic() - began - self._mean_seconds)

    async def _blocks(
        self, audio: bytes | BinaryIO | np.ndarray[Any, Any], sample_rate: int
    ) -> AsyncGenerator[Any, None]:
        if isinstance(audio, np.ndarray):
            return pcm(audio, sample_rate, self._settings.audio)
        return await wav.plain(audio, self._settings.audio) or self._audio.decode(audio)

    async def _transcribe(
        self, blocks: AsyncGenerator[Any, None], options: TranscribeOptions, deadline: float
    ) -> Transcript:
        recording = _Recording(self, options, deadline)
        windows = Windows(blocks, self._detector, self._settings.vad)
        room = asyncio.Semaphore(self._settings.request.windows_in_flight)
        tasks: list[asyncio.Task[list[Segment]]] = []
        try:
            async with asyncio.TaskGroup() as group, contextlib.aclosing(windows):
                async for window in windows:
                    await room.acquire()
                    task = group.create_task(recording.window(window))
                    task.add_done_callback(lambda _: room.release())
                    tasks.append(task)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        language = await recording.language if tasks else (options.language or "en")
        return assemble(
            (task.result() for task in tasks), task=options.task, language=language, duration=windows.duration
        )


class _Recording:
    """What a recording's windows share: the language, detected in its first window, and the request's terms."""

    def __init__(self, transcriber: Transcriber, options: TranscribeOptions, deadline: float):
        self._t = transcriber
        self._options = options
        self._deadline = deadline
        self._id = uuid.uuid4().hex
        self.language: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        known = options.language or (None if len(transcriber.languages) > 1 else "en")
        if known is not None:
            self.language.set_result(known)

    async def window(self, window: Window, before: str = "") -> list[Segment]:
        """Takes one window through the stages, and what its decoding left out again. before: text of the same window
        that precedes it."""
        decoded = await self._decode(window, before)
        if not self.language.done():
            self.language.set_result(decoded.language)
        # where voice activity heard next to nothing, the model's own doubt that somebody speaks decides
        doubtful = window.speech_seconds < LITTLE_SPEECH_S and decoded.no_speech_prob > MAX_NO_SPEECH_PROB
        if decoded.is_silence or doubtful:
            return []
        seconds = len(window.samples) / SAMPLE_RATE
        found = window_segments(decoded, self._t.tokens, start=window.start, seconds=seconds)
        if is_sparse(sum(len(segment.tokens) for segment in found), window.speech_seconds):
            left, right = window.halves()
            found = await self.window(left, before)
            return found + await self.window(right, before + _text(found))
        rest = window.after(found[-1].end - window.start) if found else None
        return found if rest is None else found + await self.window(rest, before + _text(found))

    async def _decode(self, window: Window, before: str) -> DecodedWindow:
        # as openai-whisper does, what was said before in the same window goes before as a prompt
        prompt = before or self._options.prompt
        for _ in range(INPUT_LOSSES):
            try:
                return await self._through_stages(window, prompt)
            except InputLost as lost:
                logger.warning("a window at %.1f s begins again: %s", window.start, lost)
                metrics.STAGE_RETRIES.add(stage="features", reason="input_lost")  # where the window begins again
        raise TranscriptionFailed("replicas died again and again while part of the recording was transcribed")

    async def _through_stages(self, window: Window, prompt: str | None) -> DecodedWindow:
        first = window.index == 0
        t = self._t
        t._arrivals.add(len(window.samples) / SAMPLE_RATE)
        work = self._work(window, window.samples, cost=len(window.samples), consumers=t._encoder.gpus)
        features = await t._features.call(work)
        work = self._work(window, features, cost=1, consumers=t._decoder.gpus)
        state = await t._encoder.call(work)
        del features, work
        # the others wait here, encoded, until the first has told the language
        language = await self.language if self.language.done() or not first else None
        options = replace(self._options.decoding(language, self._seed(window)), prompt=prompt)
        decoded: DecodedWindow = await t._decoder.call(self._work(window, state, cost=1, options=options))
        return decoded

    def _work(
        self,
        window: Window,
        sent: Sent,
        *,
        cost: float,
        options: DecodeOptions | None = None,
        consumers: frozenset[str] = frozenset(),
    ) -> StageWindow:
        return StageWindow(
            window_id=f"{self._id}/{window.start:.2f}+{len(window.samples)}",
            input=sent,
            cost=cost,
            deadline=self._deadline,
            priority=self._options.priority,
            seconds=len(window.samples) / SAMPLE_RATE,
            options=options,
            gpu=sent.gpu if isinstance(sent, RingDescriptor) else None,
            consumers=consumers,
        )

    def _seed(self, window: Window) -> int:
        """Who asks for a temperature wants variety; the fallback's sampling repeats for the same sound."""
        return random.getrandbits(32) if self._options.temperature > 0 else zlib.crc32(window.samples.data)


def _outcome(error: ServiceError) -> str:
    """A request's, by its error."""
    match error:
        case Overloaded():
            return "overloaded"
        case DeadlineExceeded():
            return "deadline"
        case _:
            return "invalid" if error.status < 500 else "failed"


def _text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)
