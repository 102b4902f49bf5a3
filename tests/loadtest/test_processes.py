from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from loadtest import processes

pytestmark = pytest.mark.skipif(not processes.available(), reason="needs /proc")

GROWS = """
import sys, time
print(flush=True)
sys.stdin.readline()
block = b"x" * 100_000_000
print(flush=True)
sys.stdin.readline()
"""


def test_a_tree_holds_children_of_children() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        family = processes.tree(parent.pid)
        assert family[0].pid == parent.pid
        assert len(family) == 2
        parent.communicate(b"\n")
    assert not any(map(processes.alive, family))


def test_a_process_that_ended_has_no_tree_and_no_memory() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.tree(ended.pid) == []
    assert processes.memory(ended.pid) is None


def test_an_ended_process_is_not_alive_before_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    [process] = processes.tree(child.pid)
    assert processes.alive(process)
    assert child.stdin is not None
    child.stdin.close()
    while processes.alive(process):
        time.sleep(0.01)
    assert child.wait() != 0


def test_another_process_under_the_same_id_is_not_the_same() -> None:
    here = processes.tree(os.getpid())[0]
    assert processes.alive(here)
    assert not processes.alive(processes.Process(here.pid, here.started - 1))


def test_cpu_time_grows_with_work_and_takes_in_children_that_ended() -> None:
    def burn() -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    before = processes.cpu_seconds(os.getpid())
    assert before is not None
    burn()
    alone = processes.cpu_seconds(os.getpid())
    assert alone is not None
    assert alone - before >= 0.15
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    after = processes.cpu_seconds(os.getpid())
    assert after is not None
    assert after - alone >= 0.25


def test_a_process_that_ended_has_no_cpu_time() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.cpu_seconds(ended.pid) is None


def test_the_watch_sees_by_how_much_a_child_grows() -> None:
    with subprocess.Popen([sys.executable, "-c", GROWS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        with processes.MemoryWatch(os.getpid(), interval_s=0.01) as watch:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            time.sleep(0.1)
        child.communicate(b"\n")
    [growth] = [growth for growth in watch.growth() if growth.process.pid == child.pid]
    assert growth.resident == pytest.approx(100e6, rel=0.05)
    assert growth.private == pytest.approx(100e6, rel=0.05)
    assert "block" in growth.title


def test_a_child_that_starts_later_grew_by_all_that_it_holds() -> None:
    with processes.MemoryWatch(os.getpid(), interval_s=0.01) as watch:
        subprocess.run([sys.executable, "-c", "import time; block = b'x' * 50_000_000; time.sleep(0.5)"], check=True)
    [growth] = [growth for growth in watch.growth() if "block" in growth.title]
    assert 50e6 < growth.resident < 100e6
