"""Which system calls of a QEMU are storage at work, from /proc/PID/task/TID/syscall (proc(5)).

The numbers: x86_64 from the kernel's arch/x86/entry/syscalls/syscall_64.tbl, aarch64 from the
generic table, include/uapi/asm-generic/unistd.h. Waiting for events (ppoll, epoll_pwait, futex,
io_getevents, io_uring_enter) is none of them: that is where an idle QEMU stands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class _Calls:
    of_files: frozenset[int]
    """They work on files and disks alone, or wait for such work."""
    of_any: frozenset[int]
    """They also wait for events, on a pipe or an eventfd, but then interruptibly."""
    ioctl: int


_TABLES: Final = {
    "x86_64": _Calls(
        of_files=frozenset(
            (
                *(17, 18, 295, 296, 327, 328),  # pread64 pwrite64 preadv pwritev preadv2 pwritev2
                *(74, 75, 162, 306, 277, 26),  # fsync fdatasync sync syncfs sync_file_range msync
                *(285, 77, 76, 326),  # fallocate ftruncate truncate copy_file_range
                *(209, 207),  # io_submit, and io_destroy: it waits for what is in flight
            )
        ),
        of_any=frozenset((0, 1, 19, 20, 40, 275)),  # read write readv writev sendfile splice
        ioctl=16,
    ),
    "aarch64": _Calls(
        of_files=frozenset(
            (
                *(67, 68, 69, 70, 286, 287),  # pread64 pwrite64 preadv pwritev preadv2 pwritev2
                *(82, 83, 81, 267, 84, 227),  # fsync fdatasync sync syncfs sync_file_range msync
                *(47, 46, 45, 285),  # fallocate ftruncate truncate copy_file_range
                *(2, 1),  # io_submit io_destroy
            )
        ),
        of_any=frozenset((63, 64, 65, 66, 71, 76)),  # read write readv writev sendfile splice
        ioctl=29,
    ),
}

_BLOCK_IOCTLS: Final = 0x12
"""The type of BLKDISCARD, BLKZEROOUT, BLKFLSBUF and the zone calls (linux/fs.h, blkzoned.h)."""
_SG_IO: Final = 0x2285
"""A SCSI command passed through (scsi/sg.h)."""


def is_io_call(
    number: int,
    arguments: Sequence[int],
    uninterruptible: bool,
    machine: str = os.uname().machine,
) -> bool | None:
    """Whether a thread that sleeps in this call reads, writes or syncs a file or disk.

    `number` -1 is no call at all; `arguments` those of the call, `uninterruptible` its state D.
    None on a machine whose numbers are not known here. A 32-bit QEMU on a 64-bit kernel would be
    misread: its numbers are another table's and nothing in the file tells.
    """
    calls = _TABLES.get(machine)
    if calls is None:
        return None
    if number == calls.ioctl:
        request = arguments[1] if len(arguments) > 1 else 0
        return request >> 8 & 0xFF == _BLOCK_IOCTLS or request == _SG_IO
    return number in calls.of_files or (uninterruptible and number in calls.of_any)
