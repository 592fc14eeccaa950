"""Interpret the system call of a waiting thread, from /proc/PID/task/TID/syscall (proc(5)).

This module lists the calls that wait for events or input. An idle QEMU sleeps in them. A thread
that sleeps in any other call, even an unknown one, counts as waiting for something else. Numbers:
x86_64 from the kernel's arch/x86/entry/syscalls/syscall_64.tbl, aarch64 from
include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final

from qkilld.model.dataclass import dataclass

_EVENTS: Final = frozenset(
    (
        *("poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
        *("futex", "futex_waitv", "nanosleep", "clock_nanosleep", "restart_syscall", "pause"),
        *("rt_sigtimedwait", "rt_sigsuspend", "wait4", "waitid", "accept", "accept4"),
        *("io_getevents", "io_pgetevents", "io_uring_enter", "semtimedop", "sched_yield"),
        *("recvfrom", "recvmsg", "recvmmsg"),
    )
)
"""Calls that wait for events, other threads or input. A thread in one of them counts as idle. If
requests are in flight on a ring or at a server meanwhile, other readers find them."""
_SUBMITS: Final = frozenset(("io_uring_enter",))
"""Calls that either wait for events, or execute a request of a ring and wait for storage."""
_INPUT: Final = frozenset(("read", "readv"))
"""Calls that wait for input, unless the descriptor is a file or disk."""
_FILES: Final = frozenset(
    (
        *("pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2"),
        *("fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync"),
        *("fallocate", "ftruncate", "truncate", "copy_file_range", "io_submit", "io_destroy"),
        *("close", "openat", "openat2", "open", "unlink", "unlinkat", "rename", "renameat2"),
        *("fstat", "newfstatat", "stat", "statx", "lseek", "flock", "exit", "exit_group"),
    )
)
"""Calls that work only on files and disks, or wait for such work."""
_ON_DESCRIPTOR: Final = frozenset(
    (
        *("read", "readv", "write", "writev", "sendfile", "splice", "ioctl", "fcntl", "flock"),
        *("pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2", "lseek", "fstat"),
        *("fsync", "fdatasync", "syncfs", "sync_file_range", "fallocate", "ftruncate", "close"),
        *("sendto", "sendmsg", "sendmmsg", "connect", "shutdown"),
    )
)
"""Calls whose first argument is the descriptor that they work on."""

# fmt: off
_NUMBERS: Final[Mapping[str, Mapping[int, str]]] = {
    "x86_64": {
        0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 7: "poll", 8: "lseek",
        16: "ioctl", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev", 23: "select",
        24: "sched_yield", 26: "msync", 34: "pause", 35: "nanosleep", 40: "sendfile", 42: "connect",
        43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 48: "shutdown",
        60: "exit", 61: "wait4", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync",
        76: "truncate", 77: "ftruncate", 82: "rename", 87: "unlink", 128: "rt_sigtimedwait",
        130: "rt_sigsuspend", 162: "sync", 202: "futex", 207: "io_destroy", 208: "io_getevents",
        209: "io_submit", 219: "restart_syscall", 220: "semtimedop", 230: "clock_nanosleep",
        231: "exit_group", 232: "epoll_wait", 247: "waitid", 257: "openat", 262: "newfstatat",
        263: "unlinkat", 270: "pselect6", 271: "ppoll", 275: "splice", 277: "sync_file_range",
        281: "epoll_pwait", 285: "fallocate", 288: "accept4", 295: "preadv", 296: "pwritev",
        299: "recvmmsg", 306: "syncfs", 307: "sendmmsg", 316: "renameat2", 326: "copy_file_range",
        327: "preadv2", 328: "pwritev2", 332: "statx", 333: "io_pgetevents", 426: "io_uring_enter",
        437: "openat2", 441: "epoll_pwait2", 449: "futex_waitv",
    },
    "aarch64": {
        1: "io_destroy", 2: "io_submit", 4: "io_getevents", 22: "epoll_pwait", 25: "fcntl",
        29: "ioctl", 32: "flock", 35: "unlinkat", 45: "truncate", 46: "ftruncate", 47: "fallocate",
        56: "openat", 57: "close", 62: "lseek", 63: "read", 64: "write", 65: "readv", 66: "writev",
        67: "pread64", 68: "pwrite64", 69: "preadv", 70: "pwritev", 71: "sendfile", 72: "pselect6",
        73: "ppoll", 76: "splice", 79: "newfstatat", 80: "fstat", 81: "sync", 82: "fsync",
        83: "fdatasync", 84: "sync_file_range", 93: "exit", 94: "exit_group", 95: "waitid",
        98: "futex", 101: "nanosleep", 115: "clock_nanosleep", 124: "sched_yield",
        128: "restart_syscall", 133: "rt_sigsuspend", 137: "rt_sigtimedwait", 192: "semtimedop",
        202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 210: "shutdown",
        211: "sendmsg", 212: "recvmsg", 227: "msync", 242: "accept4", 243: "recvmmsg",
        260: "wait4", 267: "syncfs", 269: "sendmmsg", 276: "renameat2", 285: "copy_file_range",
        286: "preadv2", 287: "pwritev2", 291: "statx", 292: "io_pgetevents", 426: "io_uring_enter",
        437: "openat2", 441: "epoll_pwait2", 449: "futex_waitv",
    },
}
# fmt: on

_KVM_RUN: Final = 0xAE80
"""ioctl(2) of a virtual processor that runs or idles (linux/kvm.h)."""
_BLOCK_IOCTLS: Final = 0x12
"""The type of BLKDISCARD, BLKZEROOUT, BLKFLSBUF and the zone calls (linux/fs.h, blkzoned.h)."""
_SG_IO: Final = 0x2285
"""A SCSI command passed through (scsi/sg.h)."""


@dataclass(frozen=True, slots=True)
class Call:
    """The system call that a thread is in."""

    name: str
    """The name of the call, "system call N" if it is not in our list, or "" for no call."""
    waits: bool
    """A thread that sleeps in the call waits for something other than events."""
    reads: bool
    """The call waits for input, unless the descriptor is a file or disk."""
    submits: bool
    """The call waits for events or for storage. Only the thread's kernel function (wchan) shows
    which of the two."""
    of_files: bool
    """The call works only on files or disks."""
    descriptor: int | None


def describe_call(
    number: int, arguments: Sequence[int], machine: str = os.uname().machine
) -> Call | None:
    """Return the call with this number; -1 means that the thread is in no call. Return None on an
    unknown architecture.

    On a 64-bit kernel, the calls of a 32-bit QEMU are misread: their numbers are from another
    table, and /proc does not show which table applies.
    """
    names = _NUMBERS.get(machine)
    if names is None:
        return None
    if number < 0:
        return Call("", False, False, False, False, None)
    name = names.get(number, f"system call {number}")
    request = arguments[1] if name == "ioctl" and len(arguments) > 1 else 0
    of_files = name in _FILES or request >> 8 & 0xFF == _BLOCK_IOCTLS or request == _SG_IO
    descriptor = None
    if name in _ON_DESCRIPTOR and arguments and arguments[0] < 2**31:
        descriptor = arguments[0]
    return Call(
        name=name,
        waits=name not in _EVENTS and name not in _INPUT and request != _KVM_RUN,
        reads=name in _INPUT,
        submits=name in _SUBMITS,
        of_files=of_files,
        descriptor=descriptor,
    )
