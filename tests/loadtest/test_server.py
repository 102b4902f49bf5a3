from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from loadtest import processes, server

# Answers /readyz with 503 for a while and then with 200, and has a child in a session of its own that ignores SIGTERM.
STAND_IN = """
import http.server, signal, subprocess, sys, time
port, delay = int(sys.argv[1]), float(sys.argv[2])
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
stubborn = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
stubborn.stdout.readline()
begin = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() - begin > delay else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FATE_TIMEOUT_S", 0.3)


def stand_in(delay: float = 0.0) -> tuple[list[str], str]:
    port = server.free_port()
    return [sys.executable, "-c", STAND_IN, str(port), str(delay)], f"http://127.0.0.1:{port}"


def test_a_started_server_is_waited_for_until_it_is_ready() -> None:
    command, url = stand_in(delay=0.5)
    with server.started(command, url) as at:
        assert at.url == url
        assert at.ready_s is not None
        assert at.ready_s > 0.5


def test_nothing_of_a_started_server_outlives_the_block() -> None:
    command, url = stand_in()
    with server.started(command, url) as at:
        assert at.pid is not None
        family = processes.tree(at.pid)
        assert len(family) == 2
    assert not any(map(processes.alive, family))


def test_a_server_ends_also_where_the_measurement_fails() -> None:
    command, url = stand_in()
    family: list[processes.Process] = []
    with suppress(ZeroDivisionError), server.started(command, url) as at:
        assert at.pid is not None
        family += processes.tree(at.pid)
        raise ZeroDivisionError
    assert len(family) == 2
    assert not any(map(processes.alive, family))


def test_a_server_ends_also_where_the_measurement_is_terminated() -> None:
    command, url = stand_in()
    family: list[processes.Process] = []
    with suppress(SystemExit), server.started(command, url) as at:
        assert at.pid is not None
        family += processes.tree(at.pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("the signal was ignored")
    assert len(family) == 2
    assert not any(map(processes.alive, family))


def test_a_server_that_ends_at_once_is_reported_with_its_output() -> None:
    script = "import sys; sys.exit('no such model: embedded:huge')"
    with (
        pytest.raises(server.ServerFailed, match=r"(?s)ended with status 1 before.*no such model: embedded:huge"),
        server.started([sys.executable, "-c", script], "http://127.0.0.1:9"),
    ):
        pytest.fail("it cannot be ready")


def test_a_server_that_does_not_become_ready_is_ended() -> None:
    command, url = stand_in(delay=60)
    with (
        pytest.raises(server.ServerFailed, match="not ready after 1 s"),
        server.started(command, url, ready_timeout_s=1.0),
    ):
        pytest.fail("it cannot be ready")


def test_a_server_that_will_not_end_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    server.end(process, timeout_s=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert "did not end within" in capsys.readouterr().err


def test_a_running_server_is_used_and_left_running() -> None:
    command, url = stand_in()
    with server.started(command, url) as running:
        with server.serving(f"{url}/") as at:
            assert at == server.Server(url)
        assert running.pid is not None
        assert processes.tree(running.pid)


def test_where_no_server_runs_its_absence_is_said() -> None:
    url = f"http://127.0.0.1:{server.free_port()}"
    with pytest.raises(server.ServerFailed, match=f"no server is ready at {url}"), server.serving(url):
        pytest.fail("there is none")


def test_the_serve_command_is_the_one_installed_beside_this_python() -> None:
    script, *arguments = server.serve_command()
    assert Path(script).is_file()
    assert arguments == ["serve"]
