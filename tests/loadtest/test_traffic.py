from __future__ import annotations

import threading
import time
from pathlib import Path

from loadtest import server, traffic
from loadtest.traffic import Upload
from tests.loadtest.answering import Answer, answering


async def test_replies_come_in_the_order_of_the_uploads() -> None:
    def transcribe(name: str, body: bytes) -> Answer:
        time.sleep(0.1 if name == "slow" else 0)
        return 200, {"text": name}

    with answering(transcribe) as url:
        replies = await traffic.transcribe_all(url, [Upload("slow", b""), Upload("fast", b"")], concurrency=2)
    assert [reply.text for reply in replies] == ["slow", "fast"]
    assert all(reply.ok for reply in replies)
    assert replies[0].seconds > 0.1


async def test_no_more_than_the_named_number_are_in_flight() -> None:
    lock, now, most = threading.Lock(), 0, 0
    together = threading.Barrier(4)  # breaks where fewer come

    def transcribe(name: str, body: bytes) -> Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(timeout=60)
        with lock:
            now -= 1
        return 200, {"text": ""}

    with answering(transcribe) as url:
        replies = await traffic.transcribe_all(url, [Upload(str(i), b"") for i in range(12)], concurrency=4)
    assert all(reply.ok for reply in replies)
    assert most == 4


async def test_the_file_and_its_language_are_sent(tmp_path: Path) -> None:
    seen = b""

    def transcribe(name: str, body: bytes) -> Answer:
        nonlocal seen
        seen = body
        return 200, {"text": name}

    (tmp_path / "clip.flac").write_bytes(b"fLaC...")
    with answering(transcribe) as url:
        [reply] = await traffic.transcribe_all(
            url, [Upload("en_short/clip.flac", tmp_path / "clip.flac", "sv")], concurrency=1
        )
    assert reply.name == "en_short/clip.flac"
    assert reply.text == "clip.flac"
    assert b"fLaC..." in seen
    assert b'name="language"\r\n\r\nsv\r\n' in seen
    assert b'name="response_format"\r\n\r\njson\r\n' in seen


async def test_without_a_language_none_is_sent() -> None:
    with answering(lambda name, body: (200, {"text": str(b"language" in body)})) as url:
        [reply] = await traffic.transcribe_all(url, [Upload("clip", b"")], concurrency=1)
    assert reply.text == "False"


async def test_a_refusal_is_a_reply_with_its_message() -> None:
    with answering(lambda name, body: (400, {"error": {"message": "no audio in it"}})) as url:
        [reply] = await traffic.transcribe_all(url, [Upload("clip", b"")], concurrency=1)
    assert (reply.status, reply.ok, reply.message) == (400, False, "no audio in it")


async def test_an_error_of_another_shape_has_no_message() -> None:
    with answering(lambda name, body: (500, "Internal Server Error")) as url:
        [reply] = await traffic.transcribe_all(url, [Upload("clip", b"")], concurrency=1)
    assert (reply.status, reply.message) == (500, "")


async def test_no_answer_is_a_reply_with_status_0() -> None:
    [reply] = await traffic.transcribe_all(
        f"http://127.0.0.1:{server.free_port()}", [Upload("clip", b"")], concurrency=1
    )
    assert reply.status == traffic.NO_ANSWER
    assert "ConnectError" in reply.message


async def test_the_served_models_are_told() -> None:
    with answering(lambda name, body: (200, {}), model="whisper-base") as url:
        assert await traffic.served_models(url) == ["whisper-base"]
