from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from loadtest import dataset, hostile, processes, traffic
from loadtest.hostile import ANSWERS, Case, Result
from loadtest.processes import Growth, Memory, Process
from loadtest.traffic import Reply, Upload
from tests.loadtest.answering import Answer, answering

CLIP = Upload("clip.wav", b"")
SPOKEN = "ask not what your country can do for you"


def reply(status: int, text: str = "", message: str = "") -> Reply:
    return Reply("clip.wav", status, text, message, 0.1)


@pytest.mark.parametrize(
    ("expect", "right"),
    [
        (None, ("transcript",)),
        ("clean 4xx error (moov atom missing)", ("refusal",)),
        ("decodes (content sniffing)", ("transcript",)),
        ("decodes first part or clean error", ANSWERS),
        ("no crash", ANSWERS),
    ],
)
def test_the_manifests_words_say_which_answers_are_right(expect: str | None, right: tuple[str, ...]) -> None:
    assert hostile.right_answers(expect) == right


def test_words_of_an_unknown_kind_are_an_error() -> None:
    with pytest.raises(ValueError, match="not understood"):
        hostile.right_answers("who knows")


def test_all_the_manifests_words_are_understood(shared_audio: Path) -> None:
    cases = hostile.recorded_cases(dataset.load(shared_audio))
    assert len(cases) == 39
    assert {case.right for case in cases} == {("transcript",), ("refusal",), ANSWERS}


@pytest.mark.parametrize(
    ("case", "answer", "fault"),
    [
        (Case(CLIP, ("transcript",), SPOKEN), reply(200, SPOKEN), ""),
        (Case(CLIP, ("transcript",), SPOKEN), reply(200, "thank you"), "89 % of its words are wrong"),
        (Case(CLIP, ("transcript",)), reply(200), ""),
        (Case(CLIP, ("transcript",)), reply(400, message="damaged"), "refused, but it should be transcribed"),
        (Case(CLIP, ("refusal",)), reply(413, message="too many channels"), ""),
        (Case(CLIP, ("refusal",)), reply(400), "the refusal has no message"),
        (Case(CLIP, ("refusal",)), reply(200), "transcribed, but it should be refused"),
        (Case(CLIP, ANSWERS), reply(500, message="oh"), "status 500"),
        (Case(CLIP, ANSWERS), reply(0), "no answer"),
    ],
)
def test_the_fault_of_a_reply_is_named(case: Case, answer: Reply, fault: str) -> None:
    assert hostile.fault(case, answer) == fault


def test_only_refusing_is_right_for_hostile_uploads() -> None:
    cases = hostile.hostile_cases("http://127.0.0.1:1/")
    assert {case.right for case in cases} == {("refusal",)}
    assert max(len(case.upload.read()) for case in cases) <= 25_000_000


async def test_the_trap_tells_who_called() -> None:
    async with hostile.trap() as (url, callers):
        assert callers == []
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.get(url)
        assert len(callers) == 1


async def test_normal_requests_go_on_until_the_block_is_left() -> None:
    with answering(lambda name, body: (200, {"text": SPOKEN})) as url:
        async with traffic.client(url) as http:
            async with hostile.normal_traffic(http, Case(CLIP, ("transcript",), SPOKEN)) as outcomes:
                await asyncio.sleep(0.2)
            count = len(outcomes)
            await asyncio.sleep(0.1)
    assert count >= 4
    assert len(outcomes) == count
    assert not any(outcome.fault for outcome in outcomes)


def test_growth_beyond_the_limit_and_every_wrong_reply_are_faults() -> None:
    def grown(pid: int, size: int) -> Growth:
        return Growth(Process(pid, 1), f"worker {pid}", Memory(50_000_000, 0), Memory(50_000_000 + size, 0))

    wrong = hostile.Outcome(Case(CLIP, ("refusal",)), reply(500), "status 500")
    right = hostile.Outcome(Case(CLIP, ("refusal",)), reply(400, message="no"), "")
    quiet = Result([right], [], [], [grown(7, 200_000_000)])
    assert quiet.faults() == []
    faulty = Result([right, wrong], [wrong], ["someone"], [grown(8, 200_000_001)])
    assert faulty.faults() == [
        "clip.wav: status 500",
        "a normal request: status 500 ",
        "an upload made the server call 1 times",
        "process 8 grew by 200 MB: worker 8",
    ]


@pytest.mark.skipif(not processes.available(), reason="needs /proc")
async def test_a_server_that_refuses_what_it_should_has_no_faults(shared_audio: Path) -> None:
    normal = hostile.normal_case()
    cases = hostile.recorded_cases(dataset.load(shared_audio))
    spoken = {Path(case.upload.name).name: case.reference for case in cases if case.right == ("transcript",)}
    spoken["sample.flac"] = normal.reference

    def transcribe(name: str, body: bytes) -> Answer:
        if name in spoken:
            return 200, {"text": spoken[name]}
        return 400, {"error": {"message": "it is not audio"}}

    with answering(transcribe) as url:
        result = await hostile.measure(url, os.getpid(), dataset.load(shared_audio), None)
    assert [fault for fault in result.faults() if not fault.startswith("process")] == []
    assert len(result.uploads) == 39 + 10
    assert result.normal


def test_the_memory_of_a_running_server_needs_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hostile.parse(["--url", "http://127.0.0.1:8000"])
    assert "--url and --pid belong together" in capsys.readouterr().err
