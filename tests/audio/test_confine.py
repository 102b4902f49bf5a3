from __future__ import annotations

import json
import platform
import struct
import subprocess
import sys
from typing import Any

import pytest

from serve_app.audio.confine import ALLOWED_SYSCALLS, system_call_filter

SCRIPT = """
import errno, json, os, platform, resource, signal, socket, sys
from serve_app.audio.confine import confine, leaks

read, write = os.pipe()
parent = os.getpid()
child = os.fork()
if child:
    os.close(write)
    sys.stdout.write(os.read(read, 65536).decode())
    sys.exit(os.waitpid(child, 0)[1])

seccomp = confine(parent, 2**30, 60)
attempts = {} if platform.machine() == "riscv64" else {
    "fork": os.fork,
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(parent, signal.SIGTERM),
    "unlink": lambda: os.unlink("/tmp/confined"),
}
attempts |= {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "create": lambda: os.open("/tmp/confined", os.O_CREAT | os.O_WRONLY),
    "socket": socket.socket,
    "raise the limits": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
}
errors = {}
for what, attempt in attempts.items():
    try:
        attempt()
        errors[what] = None
    except OSError as error:
        errors[what] = errno.errorcode[error.errno]
    except ValueError as error:
        errors[what] = str(error)
allocated = True
try:
    bytearray(2**30)
except MemoryError:
    allocated = False
os.write(write, json.dumps(
    {"seccomp": seccomp, "errors": errors, "leaks": leaks(), "allocated": allocated}
).encode())
os._exit(0)
"""


def confined(prelude: str = "") -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", prelude + SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.skipif(platform.machine() not in ALLOWED_SYSCALLS, reason="no system-call filter for this machine")
def test_a_confined_process_can_do_nothing_but_compute_and_write() -> None:
    result = confined()
    if result["seccomp"] is not None:
        pytest.skip(f"this kernel gives no system-call filter: {result['seccomp']}")
    limits = result["errors"].pop("raise the limits")
    assert limits == "EPERM" or "not allowed" in limits
    assert set(result["errors"].values()) == {"EPERM"}
    assert result["leaks"] == []
    assert not result["allocated"]


def test_without_a_filter_that_is_said_and_the_limits_hold() -> None:
    result = confined("import platform; platform.machine = lambda: 'riscv64'\n")
    assert result["seccomp"] == "no system-call filter for riscv64"
    assert result["errors"]["open"] == result["errors"]["create"] == result["errors"]["socket"] == "EMFILE"
    assert result["leaks"] == []
    assert not result["allocated"]


@pytest.mark.parametrize("machine", ALLOWED_SYSCALLS)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str) -> None:
    program = list(struct.iter_unpack("=HBBI", system_call_filter(machine)))
    numbers = set(ALLOWED_SYSCALLS[machine].values())
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(number: int, architecture: int = architecture) -> int:
        data, accumulator, at = {0: number, 4: architecture}, 0, 0
        while True:
            code, if_true, if_false, value = program[at]
            at += 1
            if code == 0x20:
                accumulator = data[value]
            elif code == 0x15:
                at += if_true if accumulator == value else if_false
            else:
                return int(value)

    allowed = {number for number in range(500) if verdict(number) == 0x7FFF0000}
    assert allowed == numbers
    assert verdict(0x40000000 | min(numbers)) == 0x00050001  # x32
    assert verdict(min(numbers), architecture=0x40000003) == 0x80000000  # i386
