"""Find the process that a pidfile names, and check that the file was written for this process.

Anyone who can write to a pidfile, or to a directory on its path, can choose the process. So the
path is walked step by step, as systemd does for PIDFile= (src/basic/chase.c, CHASE_SAFE). The file
is refused if anyone except root, the caller and the process's user could have replaced it.

A pidfile may also outlive its process. After a crash or a reboot, the number in it may be that of
any other process. So the process must not be younger than the file.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.debug_log import ignore
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import (
    AccessDenied,
    Failed,
    InvalidArgs,
    NoSuchProcess,
    ProcessChanged,
    UnknownIdentity,
)
from qkilld.model.text import printable

MAX_BYTES: Final = 64
SLACK_S: Final = 2.0
"""A process may seem to be younger than its pidfile by up to this many seconds. The start of a
process is known to 10 ms. The rest is for the coarse times of file systems."""
MAX_PID: Final = 2**32 - 1
"""The greatest pid that a call on the bus can contain. The kernel's own limit is far lower."""

MAX_LINKS: Final = 40
"""The number of symbolic links that Linux follows for one path."""

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PidfileProcess:
    pid: int
    start_time: int
    """Clock ticks since boot."""


@dataclass(frozen=True, slots=True)
class PathStep:
    """A file, directory or symbolic link that the path leads through."""

    shown: str
    uid: int
    gid: int
    mode: int

    @property
    def kind(self) -> str:
        if stat.S_ISLNK(self.mode):
            return "symbolic link"
        return "directory" if stat.S_ISDIR(self.mode) else "file"

    def writable_by(self, bit: int) -> bool:
        """Return whether the group (S_IWGRP) or others (S_IWOTH) can change the file, or replace
        the entries of the directory.

        In a directory with the sticky bit, such as /tmp, only the owner of an entry can replace it,
        and the next step checks this owner. The mode of a link has no meaning.
        """
        if stat.S_ISLNK(self.mode) or (stat.S_ISDIR(self.mode) and self.mode & stat.S_ISVTX):
            return False
        return bool(self.mode & bit)


@dataclass(frozen=True, slots=True)
class Content:
    """A pidfile's text, its time, and the path to it."""

    data: bytes
    mtime: float
    """Seconds since the epoch."""
    steps: tuple[PathStep, ...]
    """From the start of the path to the file itself."""
    lock: str = ""
    """MAJOR:MINOR:INODE of the file, as in /proc/locks."""


def read(path: str) -> PidfileProcess:
    """Return the process named by the pidfile at `path`.

    Raises InvalidArgs if it is not a readable pidfile, NoSuchProcess if its process is gone,
    ProcessChanged if the process is younger than the file, UnknownIdentity if the process is hidden
    or blocks the reading of its start time, and what `_own_pid` and `check_writers` raise.
    """
    shown = printable(path)
    content = _read(path, shown)
    pid = _own_pid(parse_pid(content.data, shown), content, shown)
    try:
        start_time = procfs.read_stat_patiently(pid).start_time
        process_uid = procfs.read_uid(pid)
    except (FileNotFoundError, ProcessLookupError):
        if _is_hidden(pid):
            raise UnknownIdentity(
                f"Process {pid}, named by pidfile {shown}, is hidden (ProtectProc=, hidepid=)"
            ) from None
        raise NoSuchProcess(
            f"Process {pid}, named by pidfile {shown}, is gone: "
            "the pidfile is stale and can be removed"
        ) from None
    except Unanswered as error:
        raise UnknownIdentity.blocked(pid, error.strerror) from None
    check_writers(content, process_uid, os.geteuid(), shown)
    started = boot_time() + start_time / os.sysconf("SC_CLK_TCK")
    if started > content.mtime + SLACK_S:
        raise ProcessChanged(
            f"Process {pid} is not the one that pidfile {shown} was written for: it started "
            f"{started - content.mtime:.0f} s after that. Nothing was done; if you do mean this "
            f"process, name it as {pid}"
        )
    return PidfileProcess(pid, start_time)


def _own_pid(pid: int, content: Content, shown: str) -> int:
    """Return the process's id in our PID namespace. `pid` is the id in the pidfile. It may be
    from another PID namespace.

    QEMU holds a lock on its pidfile while it runs, so the holder of the lock wrote the file.
    Raises Failed if there is no such lock and the id exists only in other PID namespaces.
    """
    holder = lock_holder(content.lock)
    if holder is not None and (holder == pid or pid in procfs.read_namespaced_pids(holder)):
        return holder
    if (procfs.PROC / str(pid)).exists():
        return pid
    others = [other for other in procfs.pids() if pid in procfs.read_namespaced_pids(other)[1:]]
    if others:
        raise Failed(
            f"Pidfile {shown} names process {pid}, which exists only in another PID namespace: it"
            f" may be process {' or '.join(map(str, others[:4]))} here. Check that, and name it by"
            " --pid"
        )
    return pid


def _is_hidden(pid: int) -> bool:
    """Return whether the process exists but is not shown in /proc."""
    try:
        os.close(os.pidfd_open(pid))
    except ProcessLookupError:
        return False
    except OSError as error:
        # EINVAL: the id is that of a thread, or too great for a process.
        return error.errno != errno.EINVAL
    return not (procfs.PROC / str(pid)).exists()


def lock_holder(file: str, proc: Path = procfs.PROC) -> int | None:
    """Return the process that has a lock on a file (MAJOR:MINOR:INODE); None if none is known.

    Source: proc_locks(5). The kernel reports the process's id in our PID namespace.
    """
    with ignore("reading the locks of files", OSError, ValueError):
        for line in (proc / "locks").read_text().splitlines():
            fields = line.split()
            if file and len(fields) >= 8 and fields[-3] == file and int(fields[-4]) > 0:
                return int(fields[-4])
    return None


def parse_pid(data: bytes, shown: str) -> int:
    """Parse `data`, a decimal number that may have white space around it. Raises InvalidArgs."""
    digits = data.strip()
    if len(data) > MAX_BYTES or not digits.isdigit() or not 0 < int(digits) <= MAX_PID:
        raise InvalidArgs(
            f"{shown} is not a pidfile: it must hold one process id "
            "as a decimal number and nothing else"
        )
    return int(digits)


def check_writers(content: Content, process_uid: int, caller_uid: int, shown: str) -> None:
    """Raise AccessDenied if anyone except root, the caller and the process's user could have
    written or replaced the file. Such a user could choose which process the caller stops."""
    trusted = {0, caller_uid, process_uid}
    for step in content.steps:
        subject = f"Pidfile {shown}"
        if step is not content.steps[-1]:
            subject += f" is reached through {step.kind} {step.shown}, which"
        if step.writable_by(stat.S_IWOTH):
            raise AccessDenied(
                f"{subject} is writable by everybody, so its content proves nothing: "
                "check the process id in it, and give that id instead"
            )
        # Assume that a group with the same number as a trusted user is that user's private group.
        if step.writable_by(stat.S_IWGRP) and step.gid not in trusted:
            raise AccessDenied(
                f"{subject} is writable by group {step.gid}, whose members may have written it: "
                "check the process id in it, and give that id instead"
            )
        if step.uid not in trusted:
            raise AccessDenied(
                f"{subject} belongs to uid {step.uid}, who is neither you nor root nor the "
                "user of the process: check the process id in it, and give that id instead"
            )


def boot_time() -> float:
    """Return the boot time in seconds since the epoch, according to the current wall clock.
    (/proc/stat has it, too, but ProcSubset=pid hides that file.)"""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: str, shown: str) -> Content:
    try:
        fd, steps = _walk(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidArgs(f"Cannot read pidfile {shown}: {printable(reason)}") from None
    try:
        if not stat.S_ISREG(steps[-1].mode):
            raise InvalidArgs(f"{shown} is not a pidfile: it is not a regular file")
        # Open the file for reading only after the checks, because opening a device can have side
        # effects.
        with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:  # noqa: PTH123
            data = file.read(MAX_BYTES + 1)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise InvalidArgs(f"Cannot read pidfile {shown}: {error.strerror}") from None
    finally:
        os.close(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    return Content(data, status.st_mtime, steps, f"{device}:{status.st_ino}")


def _walk(path: str) -> tuple[int, tuple[PathStep, ...]]:
    """Open the file at the end of the path (O_PATH), and return every step of the path.

    Raises OSError, ValueError.
    """
    ahead = [part for part in reversed(path.split("/")) if part]
    here = os.open("/" if path.startswith("/") else ".", _DIRECTORY)
    steps = [_step("/" if path.startswith("/") else ".", here)]
    links = 0
    try:
        while ahead:
            name = ahead.pop()
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            steps.append(_step(name, fd))
            if not stat.S_ISLNK(steps[-1].mode):
                os.close(here)
                here = fd
                continue
            try:
                target = os.readlink("", dir_fd=fd)
            finally:
                os.close(fd)
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.startswith("/"):
                root = os.open("/", _DIRECTORY)
                os.close(here)
                here = root
                steps.append(_step("/", here))
            ahead += [part for part in reversed(target.split("/")) if part]
    except BaseException:
        os.close(here)
        raise
    return here, tuple(steps)


def _step(name: str, fd: int) -> PathStep:
    status = os.fstat(fd)
    return PathStep(printable(name), status.st_uid, status.st_gid, status.st_mode)
