"""Decoding in sandboxed processes: real processes, really killed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from serve_app.audio.decode import AudioDecoder
from serve_app.errors import AudioTooLarge, InvalidAudio, ServiceError
from serve_app.settings import AudioSettings
from tests.audio.make import encode, long_opus, noise, wav
from tests.audio.processes import (
    alive,
    children,
    decoders,
    environment,
    open_descriptors,
    peak_bytes,
    sandboxes,
    transferred,
    until,
)

MiB = 2**20
LONG = wav(noise(120))


@pytest_asyncio.fixture
async def decoder() -> AsyncIterator[AudioDecoder]:
    async with AudioDecoder(AudioSettings()) as decoder:
        yield decoder


@pytest_asyncio.fixture
async def impatient() -> AsyncIterator[AudioDecoder]:
    async with AudioDecoder(AudioSettings(stall_timeout_s=2)) as decoder:
        yield decoder


async def collect(decoder: AudioDecoder, source: bytes | BinaryIO) -> npt.NDArray[np.int16]:
    return np.concatenate([block async for block in decoder.decode(source)])


async def test_bytes_and_files_are_decoded(decoder: AudioDecoder, tmp_path: Path) -> None:
    original = noise(5)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(original))
    assert np.array_equal(await collect(decoder, wav(original)), original)
    with path.open("rb") as file:
        assert np.array_equal(await collect(decoder, file), original)
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(wav(original))
        spooled.seek(0)
        assert np.array_equal(await collect(decoder, spooled), original)  # type: ignore[arg-type]


async def test_a_container_with_its_index_at_the_end_is_decoded(decoder: AudioDecoder) -> None:
    data = encode(noise(5), 16_000, "ipod", "aac")
    assert data.index(b"moov") > data.index(b"mdat")
    assert abs(len(await collect(decoder, data)) / 16_000 - 5) < 0.1


async def test_nothing_can_be_opened_in_the_sandbox(decoder: AudioDecoder) -> None:
    assert decoder.report is not None
    assert decoder.report.leaks == []


async def test_the_sandbox_gets_no_secrets(decoder: AudioDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPER_SERVE_HTTP__API_KEYS", '["secret"]')
    async with AudioDecoder(AudioSettings()) as other:
        await other.start()
        for sandbox in sandboxes():
            assert b"secret" not in environment(sandbox)
            assert b"PYTHONPATH=" in environment(sandbox)


async def test_a_slow_consumer_holds_the_process_back(impatient: AudioDecoder) -> None:
    async with contextlib.aclosing(impatient.decode(LONG)) as blocks:
        await anext(blocks)
        [process] = decoders()
        before = -1
        while before != (before := transferred(process)):  # until the pipes are full
            await asyncio.sleep(0.5)
        await asyncio.sleep(2.5)  # longer than the stall timeout, which counts only while a block is wanted
        assert transferred(process) == before
        rest = [block async for block in blocks]
    assert 118 < sum(map(len, rest)) / 16_000 < 120


async def test_no_more_recordings_at_once_than_workers() -> None:
    async with AudioDecoder(AudioSettings(workers=2)) as decoder:
        first, second = decoder.decode(LONG), decoder.decode(LONG)
        await anext(first)
        await anext(second)
        third = asyncio.create_task(collect(decoder, wav(noise(1))))
        await asyncio.sleep(0.3)
        assert len(decoders()) == 2
        assert not third.done()
        await first.aclose()
        assert len(await third) == 16_000
        await second.aclose()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", InvalidAudio, "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), InvalidAudio, "PNG image"),
        (wav(noise(1), channels=64), AudioTooLarge, "64 channels"),
    ],
)
async def test_errors_come_through(decoder: AudioDecoder, data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        await collect(decoder, data)
    assert len(await collect(decoder, wav(noise(1)))) == 16_000


async def test_too_large_an_upload_is_refused() -> None:
    async with AudioDecoder(AudioSettings(max_upload_bytes=MiB)) as decoder:
        for source in (LONG, io.BytesIO(LONG)):
            with pytest.raises(AudioTooLarge, match="larger than the limit of 1 MiB"):
                await collect(decoder, source)


async def test_a_recording_that_takes_too_much_memory_is_refused() -> None:
    junk = b"ID3\x04\x00\x00\x0f\x7f\x7f\x7f" + bytes(200 * MiB)
    async with AudioDecoder(AudioSettings(worker_memory_bytes=320 * MiB)) as decoder:
        with pytest.raises(AudioTooLarge, match="320 MiB of memory"):
            await collect(decoder, junk)
        assert len(await collect(decoder, wav(noise(1)))) == 16_000


async def test_a_recording_that_takes_too_much_time_is_refused() -> None:
    async with AudioDecoder(AudioSettings(worker_cpu_seconds=1, max_seconds=10**6)) as decoder:
        with pytest.raises(InvalidAudio, match="limit of CPU time"):
            await collect(decoder, long_opus(1800))


async def test_a_limit_too_low_to_decode_anything_is_found_at_the_start() -> None:
    with pytest.raises(ServiceError, match="did not start"):
        await AudioDecoder(AudioSettings(worker_memory_bytes=64 * MiB)).start()
    assert sandboxes() == []


async def test_a_source_that_cannot_be_read_is_no_recording_that_ended(decoder: AudioDecoder) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > MiB:
                raise OSError("the disk is gone")
            return super().read(size)

    with pytest.raises(OSError, match="the disk is gone"):
        await collect(decoder, Broken(LONG))


async def test_a_process_that_hangs_is_ended(impatient: AudioDecoder) -> None:
    blocks = impatient.decode(LONG)
    await anext(blocks)
    [process] = decoders()
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(InvalidAudio, match="took too long"):
        async for _ in blocks:
            pass
    assert decoders() == []


async def test_a_process_that_crashes_harms_no_other(decoder: AudioDecoder) -> None:
    victim = decoder.decode(LONG)
    await anext(victim)
    [process] = decoders()
    other = asyncio.create_task(collect(decoder, LONG))
    os.kill(process, signal.SIGSEGV)
    with pytest.raises(InvalidAudio, match="its decoder crashed"):
        async for _ in victim:
            pass
    assert len(await other) == 120 * 16_000


@pytest.mark.parametrize("source", [bytes, io.BytesIO])
@pytest.mark.parametrize("victims", [decoders, sandboxes])
async def test_a_recording_whose_process_is_killed_is_decoded_again(
    decoder: AudioDecoder, source: type, victims: Any
) -> None:
    blocks = decoder.decode(source(LONG))
    parts = [await anext(blocks) for _ in range(40)]
    [process] = victims()
    os.kill(process, signal.SIGKILL)
    parts += [block async for block in blocks]
    assert np.array_equal(np.concatenate(parts), noise(120))


async def test_a_recording_whose_process_is_killed_twice_fails(decoder: AudioDecoder) -> None:
    blocks = decoder.decode(LONG)

    async def kill_and_go_on() -> None:
        for _ in range(2):
            await anext(blocks)
            os.kill(decoders()[0], signal.SIGKILL)
            for _ in range(30):
                await anext(blocks)

    with pytest.raises(ServiceError, match="was killed") as raised:
        await kill_and_go_on()
    assert raised.value.code == "decoder_died"
    assert len(await collect(decoder, wav(noise(1)))) == 16_000


async def test_a_forking_process_that_hangs_is_replaced(
    impatient: AudioDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.audio.zygote.STOP_TIMEOUT_S", 0.5)
    os.kill(sandboxes()[0], signal.SIGSTOP)
    with pytest.raises(InvalidAudio, match="took too long"):
        await collect(impatient, wav(noise(1)))
    assert len(await collect(impatient, wav(noise(1)))) == 16_000


async def test_leaving_early_ends_the_process(decoder: AudioDecoder) -> None:
    blocks = decoder.decode(LONG)
    await anext(blocks)
    assert len(decoders()) == 1
    await blocks.aclose()
    assert decoders() == []


class Endless(io.BytesIO):
    """A recording that goes on for as long as it is read, a second of it every 10 ms."""

    def __init__(self) -> None:
        super().__init__(wav(noise(1), claimed_bytes=2**31))

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.01)
        return super().read(size) or noise(1).tobytes()


async def test_a_cancelled_task_ends_its_process(decoder: AudioDecoder) -> None:
    for delay in (0, 0.001, 0.003, 0.01, 0.03, 0.1):
        task = asyncio.create_task(collect(decoder, Endless()))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: decoders() == [])


async def test_close_leaves_nothing_behind() -> None:
    descriptors = open_descriptors()
    decoder = AudioDecoder(AudioSettings())
    blocks = decoder.decode(LONG)
    await anext(blocks)
    before = {*sandboxes(), *decoders()}
    await decoder.close()
    with pytest.raises(ServiceError, match="shut down"):
        async for _ in blocks:
            pass
    await until(lambda: not any(map(alive, before)))
    with pytest.raises(ServiceError, match="shut down"):
        await collect(decoder, LONG)
    assert open_descriptors() == descriptors


async def test_nothing_outlives_a_parent_that_is_killed() -> None:
    script = """
import asyncio
from serve_app.audio.decode import AudioDecoder
from serve_app.settings import AudioSettings
from tests.audio.make import noise, wav

async def main():
    blocks = AudioDecoder(AudioSettings()).decode(wav(noise(120)))
    await anext(blocks)
    print("decoding", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"decoding\n"
    [sandbox] = sandboxes(parent.pid)
    [process] = children(sandbox)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(sandbox))
    await until(lambda: not alive(process))


async def test_hostile_recordings_cost_little_and_disturb_nobody() -> None:
    """Nine hours in 25 MB, forged sample rates, 64 channels: refused while no process grows by 200 MB, and while
    another recording is decoded."""
    nine_hours = long_opus(9 * 3600)
    assert len(nine_hours) < 25 * MiB
    hostile = {
        "nine hours of Opus": (nine_hours, "longer than the limit of 4 hours"),
        "64 channels": (wav(noise(10), channels=64), "64 channels"),
        "rate 2^31 - 1": (wav(noise(10), claimed_rate=2**31 - 1), "sample rate of 2147483647 Hz"),
        "rate 2^31": (wav(noise(10), claimed_rate=2**31), "WAV|sample rate"),
        "rate 1": (wav(noise(10), claimed_rate=1), "sample rate of 1 Hz"),
        "rate 0": (wav(noise(10), claimed_rate=0), "WAV|sample rate"),
    }
    normal = wav(noise(30))
    async with AudioDecoder(AudioSettings(workers=2)) as decoder:
        await collect(decoder, normal)
        ours, [sandbox] = peak_bytes(os.getpid()), sandboxes()
        theirs, usual = peak_bytes(sandbox), decoder.usage.peak_bytes
        for what, (data, message) in hostile.items():
            started = asyncio.get_running_loop().time()
            meanwhile = asyncio.create_task(collect(decoder, normal))
            with pytest.raises((AudioTooLarge, InvalidAudio), match=message):
                await collect(decoder, io.BytesIO(data))
            assert len(await meanwhile) == 30 * 16_000, what
            assert asyncio.get_running_loop().time() - started < 15, what
        await until(lambda: decoder.usage.recordings == 1 + 2 * len(hostile))
        assert decoder.usage.peak_bytes - usual < 200 * MiB
        assert peak_bytes(sandbox) - theirs < 200 * MiB
        assert peak_bytes(os.getpid()) - ours < 200 * MiB
