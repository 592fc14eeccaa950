"""What a process has open: its images and its sockets. Sources: proc_pid_fd(5), proc_pid_fdinfo(5).

No path of the process is opened or looked at. What a descriptor refers to is told by its link
(readlink(2) gives text and visits nothing), its mode and mount by fdinfo, and the file system by
mountinfo. Only where that says tmpfs or devtmpfs, which live in memory, is the open file itself
asked (stat of /proc/PID/fd/N) whether it is a block device: a file on a network is not, since that
could wait for a dead server.

Which open files are images cannot be told for certain. Taken for one: regular files and block
devices that are open for reading, or for reading and writing. QEMU opens images in no other way,
and its logs and pidfile for writing alone.

Needs the ptrace right (PTRACE_MODE_READ_FSCREDS) for another user's process: CAP_SYS_PTRACE.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.evidence.mountinfo import Filesystem, Mounts

PROC: Final = Path("/proc")
MAX_DESCRIPTORS: Final = 4096
"""Looked at of one process; one that has more is not looked into at all."""

_FDINFO_BYTES: Final = 256
"""pos, flags and mnt_id come first; what follows (locks) has no end."""
_IN_MEMORY: Final = frozenset({"tmpfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What /proc/PID/fd lists."""

    count: int
    files: tuple[tuple[str, str], ...]
    """(number, path); a path too long for the kernel to tell is ""."""
    sockets: tuple[tuple[str, int], ...]
    """(number, inode)."""

    @property
    def too_many(self) -> bool:
        """Not all of them were looked at, and none is told."""
        return self.count > MAX_DESCRIPTORS


class Image(NamedTuple):
    """A file or block device that the process has open."""

    device: str
    """MAJOR:MINOR of the block device that is open itself; "" for a file."""
    filesystem: Filesystem | None
    """That the file lies on; None where it is in no mount that can be seen."""
    writable: bool


def read_descriptors(pid: int, proc: Path = PROC) -> Descriptors | None:
    """None where they cannot be read: it is gone, or not ours to see. 4 µs a descriptor."""
    try:
        directory = os.open(f"{proc}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_DESCRIPTORS + 1)]
        if len(names) > MAX_DESCRIPTORS:
            return Descriptors(len(names), (), ())
        return _sort(directory, names)
    except OSError:
        return None
    finally:
        os.close(directory)


def _sort(directory: int, names: list[str]) -> Descriptors:
    """Raises OSError."""
    files: list[tuple[str, str]] = []
    sockets: list[tuple[str, int]] = []
    for name in names:
        try:
            link = os.readlink(name, dir_fd=directory)
        except FileNotFoundError:
            continue  # closed by now
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            link = ""
        if link[:1] in ("/", ""):
            files.append((name, link))
        elif link.startswith("socket:[") and link[8:-1].isdecimal():
            sockets.append((name, int(link[8:-1])))
    return Descriptors(len(names), tuple(files), tuple(sockets))


def read_images(pid: int, descriptors: Descriptors, proc: Path = PROC) -> tuple[Image, ...] | None:
    """What of the files may be an image, each file system once. None where it cannot be read.

    10 µs a file, and mountinfo.
    """
    if not descriptors.files:
        return ()
    try:
        directory = os.open(f"{proc}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    found: dict[Image, None] = {}
    tables = _Tables(pid, proc)
    try:
        for number, path in descriptors.files:
            image = _image(directory, number, path, tables)
            if image is not None:
                found[image] = None
    except (OSError, ValueError):
        return None
    finally:
        os.close(directory)
    return tuple(found)


class _Tables:
    """The mounts of the process and, for descriptors that were handed to it, those of the system
    (systemd opens /dev/null before the process has mounts of its own) and our own."""

    def __init__(self, pid: int, proc: Path) -> None:
        self._pids = (pid, "1", "self")
        self._proc = proc
        self._read: dict[int | str, Mounts] = {}

    def filesystem(self, mount: int) -> Filesystem | None:
        for pid in self._pids:
            if pid not in self._read:
                self._read[pid] = Mounts(pid, self._proc)
            if (found := self._read[pid].get(mount)) is not None:
                return found
        return None


def _image(directory: int, number: str, path: str, tables: _Tables) -> Image | None:
    """None for what is none. Raises OSError, ValueError."""
    try:
        flags, mount = _flags_and_mount(directory, number)
    except FileNotFoundError:
        return None  # closed by now
    if flags & (os.O_PATH | os.O_DIRECTORY) or flags & os.O_ACCMODE == os.O_WRONLY:
        return None
    writable = flags & os.O_ACCMODE == os.O_RDWR
    filesystem = tables.filesystem(mount)
    if filesystem is None:
        # memfd and its like: on mounts of the kernel's own, where each has a name and no directory.
        internal = path.endswith(" (deleted)") and path.rfind("/") == 0
        return None if internal else Image("", None, writable)
    if filesystem.kind not in _IN_MEMORY:
        return Image("", filesystem, writable)
    try:
        status = os.stat(f"fd/{number}", dir_fd=directory)
    except FileNotFoundError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    return Image(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}", None, writable)


def _flags_and_mount(directory: int, number: str) -> tuple[int, int]:
    """Raises OSError, ValueError where fdinfo does not tell."""
    fd = os.open(f"fdinfo/{number}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        text = os.read(fd, _FDINFO_BYTES)
    finally:
        os.close(fd)
    fields = dict(line.partition(b":")[::2] for line in text.splitlines())
    return int(fields.get(b"flags", b""), 8), int(fields.get(b"mnt_id", b""))
