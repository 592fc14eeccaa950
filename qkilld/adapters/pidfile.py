"""The process that a pidfile names, if it is still the one that the file was written for.

A pidfile is the word of whoever can write it, and it outlives its process: after a crash or a
reboot its number belongs to anybody.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.model.errors import AccessDenied, InvalidArgs, NoSuchProcess, ProcessChanged
from qkilld.model.text import printable

MAX_BYTES: Final = 64
SLACK_S: Final = 2.0
"""The start of a process is known to 10 ms and the boot time to 1 s; the rest is for coarse
file system clocks."""
MAX_PID: Final = 2**32 - 1
"""What fits the bus; the kernel's own limit is far lower."""


@dataclass(frozen=True, slots=True)
class Named:
    """A process that a pidfile names."""

    pid: int
    start_time: int
    """Clock ticks since boot."""


@dataclass(frozen=True, slots=True)
class Content:
    """What was found in a pidfile."""

    data: bytes
    mtime: float
    """Seconds since the epoch."""
    uid: int
    mode: int


def read(path: str) -> Named:
    """The process named by the pidfile at `path`.

    Raises InvalidArgs for what is no readable pidfile, NoSuchProcess where its process is gone,
    ProcessChanged where the process is younger than the file, AccessDenied where somebody may have
    written it who has no say over that process.
    """
    shown = printable(path)
    content = _read(path, shown)
    pid = parse_pid(content.data, shown)
    try:
        start_time = start_time_of(pid)
        process_uid = real_uid_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise NoSuchProcess(
            f"Process {pid}, named by pidfile {shown}, is gone: "
            "the pidfile is stale and can be removed"
        ) from None
    check_writer(content, process_uid, os.geteuid(), shown)
    started = boot_time() + start_time / os.sysconf("SC_CLK_TCK")
    if started > content.mtime + SLACK_S:
        raise ProcessChanged(
            f"Process {pid} is not the one that pidfile {shown} was written for: it started "
            f"{started - content.mtime:.0f} s after that. Nothing was done; if you do mean this "
            f"process, name it as {pid}"
        )
    return Named(pid, start_time)


def parse_pid(data: bytes, shown: str) -> int:
    """The one decimal number in `data`, white space around it. Raises InvalidArgs."""
    digits = data.strip()
    if len(data) > MAX_BYTES or not digits.isdigit() or not 0 < int(digits) <= MAX_PID:
        raise InvalidArgs(
            f"{shown} is not a pidfile: it must hold one process id "
            "as a decimal number and nothing else"
        )
    return int(digits)


def check_writer(content: Content, process_uid: int, caller_uid: int, shown: str) -> None:
    """Raise AccessDenied unless root, the caller or the process's own user wrote the file.

    Whoever else wrote it would be choosing which process the caller's rights are used on.
    """
    if content.mode & stat.S_IWOTH:
        raise AccessDenied(
            f"Pidfile {shown} is writable by everybody, so its content proves nothing: "
            "check the process id in it and name that instead"
        )
    if content.uid not in (0, caller_uid, process_uid):
        raise AccessDenied(
            f"Pidfile {shown} belongs to uid {content.uid}, who is neither you nor root nor the "
            "user of the process in it: check that process id and name it instead"
        )


def start_time_of(pid: int) -> int:
    """Field 22 of /proc/PID/stat, proc(5), in clock ticks since boot.

    Raises FileNotFoundError or ProcessLookupError where the process is gone.
    """
    text = Path(f"/proc/{pid}/stat").read_bytes()
    # Field 2 is the name in parentheses, which may itself hold blanks and parentheses.
    return int(text.rpartition(b")")[2].split()[19])


def real_uid_of(pid: int) -> int:
    """The real uid, from /proc/PID/status. Raises as `start_time_of` does."""
    return int(_fields(Path(f"/proc/{pid}/status").read_bytes())[b"Uid:"].split()[0])


def boot_time() -> int:
    """When the system booted by today's wall clock, in seconds since the epoch: btime, proc(5)."""
    return int(_fields(Path("/proc/stat").read_bytes())[b"btime"])


def _fields(text: bytes) -> Mapping[bytes, bytes]:
    """The rest of each line by its first word."""
    return {
        key: rest
        for key, _, rest in (
            line.replace(b"\t", b" ").partition(b" ") for line in text.splitlines()
        )
    }


def _read(path: str, shown: str) -> Content:
    try:
        # A FIFO in the place of the file must not hold the client up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidArgs(f"Cannot read pidfile {shown}: {printable(reason)}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgs(f"{shown} is not a pidfile: it is not a regular file")
        data = os.read(fd, MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgs(f"Cannot read pidfile {shown}: {error.strerror}") from None
    finally:
        os.close(fd)
    return Content(data, status.st_mtime, status.st_uid, status.st_mode)
