"""Gives up, for good, what a process that decodes a stranger's recording does not need.

Linux only. Three layers, each enough by itself against a decoder that was talked into opening a file or a connection:
no new file descriptors (``RLIMIT_NOFILE`` 0), no new privileges, and a system-call filter (seccomp) that lets through
memory, time and reading or writing what is already open, and answers everything else with EPERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
BPF_LOAD_WORD, BPF_JUMP_EQUAL, BPF_RETURN = 0x20, 0x15, 0x06
OFFSET_SYSCALL, OFFSET_ARCHITECTURE = 0, 4  # in struct seccomp_data

# Numbers from the kernel's asm/unistd.h; poll exists on x86_64 alone.
ALLOWED_SYSCALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "readv": 19, "writev": 20,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60, "gettimeofday": 96,
        "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219,
        "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231, "ppoll": 271, "getrandom": 318, "rseq": 334,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226, "munmap": 215,
        "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "readv": 65, "writev": 66,
        "sched_yield": 124, "mremap": 216, "madvise": 233, "getpid": 172, "exit": 93, "gettimeofday": 169,
        "sigaltstack": 132, "gettid": 178, "futex": 98, "sched_getaffinity": 123, "restart_syscall": 128,
        "clock_gettime": 113, "clock_nanosleep": 115, "exit_group": 94, "ppoll": 73, "getrandom": 278, "rseq": 293,
    },
}  # fmt: skip
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int = 0, pointer: object = 0) -> None:
    """prctl(2); raises OSError."""
    arguments = (ctypes.c_ulong(argument), pointer or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if _libc.prctl(ctypes.c_int(option), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def system_call_filter(machine: str) -> bytes:
    """The BPF program that allows ``ALLOWED_SYSCALLS`` and denies all else with EPERM. Another architecture's calls
    end the process, and the x32 calls of x86_64 differ from the allowed numbers by a high bit."""
    numbers = ALLOWED_SYSCALLS[machine].values()
    program = [
        (BPF_LOAD_WORD, 0, 0, OFFSET_ARCHITECTURE),
        (BPF_JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURE[machine]),
        (BPF_RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (BPF_LOAD_WORD, 0, 0, OFFSET_SYSCALL),
        *((BPF_JUMP_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine(parent: int, memory_bytes: int, cpu_seconds: float) -> str | None:
    """Confines the calling process, which dies with the process ``parent`` that forked it.

    Returns None, or why the system-call filter could not be had; the limits hold either way. Raises OSError where
    even they cannot be set.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    cpu = max(1, round(cpu_seconds))
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    with contextlib.suppress(ValueError):  # the hard limit was lower
        # At the soft limit SIGXCPU tells what happened; SIGKILL, at the hard limit, could be anyone's.
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    machine = platform.machine()
    if machine not in ALLOWED_SYSCALLS:
        return f"no system-call filter for {machine}"
    code = system_call_filter(machine)
    program = _Program(len(code) // 8, code)
    try:
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))
    except OSError as error:
        return str(error)
    return None


def leaks() -> list[str]:
    """What the calling process, confined, can do all the same: empty where confinement holds."""
    attempts: dict[str, Callable[[], object]] = {
        "open a file": lambda: os.open("/dev/null", os.O_RDONLY),
        "open a socket": socket.socket,
        "open a pipe": os.pipe,
    }
    found = []
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        found.append(what)
    return found
