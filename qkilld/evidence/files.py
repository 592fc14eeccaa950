"""Read the open files of a process: its images and sockets.

Sources: proc_pid_fd(5), proc_pid_fdinfo(5).

The link of a descriptor shows the file's path, fdinfo shows its mode and mount, and mountinfo shows
the file system. Accessing the file itself could block if its server is dead. So only files on tmpfs
and devtmpfs, which are in memory, are accessed: stat(2) shows which of them are block devices, and
their content shows which are images.

The kernel does not show which open files are images. Regular files and block devices count as
images, except the guest's memory and files that are open only for writing, such as QEMU's logs.

Needs the ptrace right (PTRACE_MODE_READ_FSCREDS) for another user's process: CAP_SYS_PTRACE.
"""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Container
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import (
    MAX_MOUNTINFO,
    Filesystem,
    Mounts,
    read_bounded,
    read_links,
)
from qkilld.debug_log import note_once
from qkilld.model.dataclass import dataclass
from qkilld.model.named_tuple import NamedTuple

PROC: Final = Path("/proc")
MAX_DESCRIPTORS: Final = 4096
"""A process with more descriptors than this is not examined."""
MORE_MOUNTS: Final = 256 << 10
"""The mountinfo of a process counts as unreadable if it is more than this many bytes longer than
ours. The kernel takes 70 ms to write this many bytes, about 1,800 mounts (measured). Any user can
have 100,000 mounts in a namespace of their own."""

_FDINFO_BYTES: Final = 256
"""This is enough for pos, flags and mnt_id, which come first. Any number of locks may follow."""
_FORMATS: Final = (
    *(b"QFI\xfb", b"QED\0", b"KDMV", b"COWD", b"vhdxfile", b"conectix", b"LUKS\xba\xbe"),
    *(b"WithoutFreeSpace", b"WithouFreSpacExt"),
)
"""Magic numbers: qcow2, QED, VMDK, VHDX, VHD, LUKS, Parallels."""
_VDI: Final = b"\x7f\x10\xda\xbe"
_VDI_AT: Final = 64
"""The offset of a VDI image's magic number."""
_IN_MEMORY: Final = frozenset({"tmpfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The contents of /proc/PID/fd."""

    count: int
    files: tuple[tuple[str, str], ...]
    """The number and path of each file. The path is "" if it is too long for the kernel to show."""
    sockets: tuple[tuple[str, int], ...]
    """The number and inode of each socket."""

    @property
    def too_many(self) -> bool:
        """Whether the process has so many descriptors that none is listed."""
        return self.count > MAX_DESCRIPTORS


class Image(NamedTuple):
    """A file or block device that the process has open."""

    device: str
    """MAJOR:MINOR if it is a block device; "" for a file."""
    filesystem: Filesystem | None
    """The file system that contains the file; None for a block device, or if the mount is not
    visible."""
    writable: bool
    path: str
    """The path as the kernel shows it; "" if it is too long to be shown."""
    inherited: bool = False
    """Whether the process may have been started with this descriptor. A descriptor with O_CLOEXEC
    was opened by the process itself, as QEMU does with images."""


def read_descriptors(pid: int, proc: Path = PROC) -> Descriptors | None:
    """List the descriptors; None if the process is gone or hidden. Costs 4 µs for each
    descriptor."""
    try:
        directory = os.open(f"{proc}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        note_once("listing descriptors", error)
        return None
    try:
        links = read_links(directory, MAX_DESCRIPTORS)
    except OSError as error:
        note_once("listing descriptors", error)
        return None
    finally:
        os.close(directory)
    if links is None:
        note_once("listing descriptors", f"there are more than {MAX_DESCRIPTORS}")
        return Descriptors(MAX_DESCRIPTORS + 1, (), ())
    files = tuple(each for each in links if each[1][:1] in ("/", ""))
    sockets = tuple(
        (number, int(link[8:-1]))
        for number, link in links
        if link.startswith("socket:[") and link[8:-1].isdecimal()
    )
    return Descriptors(len(links), files, sockets)


def read_images(
    pid: int, descriptors: Descriptors, proc: Path = PROC, outputs: Container[int] = ()
) -> dict[int, Image] | None:
    """Return the files that may be images, keyed by descriptor. None if unreadable.

    Files that are open only for writing are not images, and are left out unless their descriptors
    are in `outputs`. Costs 10 µs for each file, and reads mountinfo.
    """
    if not descriptors.files:
        return {}
    try:
        directory = os.open(f"{proc}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        note_once("looking for images", error)
        return None
    images: dict[int, Image] = {}
    tables = _Tables(pid, proc)
    try:
        for number, path in descriptors.files:
            image = _image(directory, number, path, tables, output=int(number) in outputs)
            if image is not None:
                images[int(number)] = image
    except (OSError, ValueError) as error:
        note_once("looking for images", error)
        return None
    finally:
        os.close(directory)
    return images


class _Tables:
    """The mounts of the process, those of process 1, and our own. An inherited descriptor may
    belong to a mount that the process does not have. For example, systemd opens /dev/null before
    the process gets its own mounts."""

    def __init__(self, pid: int, proc: Path) -> None:
        self._pids = (pid, "1", "self")
        self._proc = proc
        self._read: dict[int | str, Mounts] = {}

    def filesystem(self, mount: int) -> Filesystem | None:
        for pid in self._pids:
            if pid not in self._read:
                is_own = pid == self._pids[0]
                most = _most_bytes(self._proc, int(time.monotonic() // 60))
                self._read[pid] = Mounts(pid, self._proc, most if is_own else MAX_MOUNTINFO)
            if (cached := self._read[pid].get(mount)) is not None:
                return cached
        return None


@functools.lru_cache(maxsize=4)
def _most_bytes(proc: Path, minute: int) -> int:
    """Return how many bytes the mountinfo of a process may have. The result is kept for a
    minute."""
    ours = read_bounded(f"{proc}/self/mountinfo", MAX_MOUNTINFO)
    return MAX_MOUNTINFO if ours is None else min(len(ours) + MORE_MOUNTS, MAX_MOUNTINFO)


def _image(
    directory: int, number: str, path: str, tables: _Tables, *, output: bool
) -> Image | None:
    """Return the image; None if the file is not an image. Raises OSError, ValueError."""
    try:
        flags, mount = _flags_and_mount(directory, number)
    except FileNotFoundError:
        return None  # The descriptor was closed.
    if flags & (os.O_PATH | os.O_DIRECTORY):
        return None
    if flags & os.O_ACCMODE == os.O_WRONLY and not output:
        return None
    writable, inherited = flags & os.O_ACCMODE == os.O_RDWR, not flags & os.O_CLOEXEC
    filesystem = tables.filesystem(mount)
    if filesystem is None:
        # Files on an internal mount of the kernel, such as a memfd, have a name but no directory:
        # they are memory, not images.
        internal = path.endswith(" (deleted)") and path.rfind("/") == 0
        return None if internal else Image("", None, writable, path, inherited)
    if filesystem.kind == "devpts":
        return None  # A terminal.
    if filesystem.kind not in _IN_MEMORY:
        return Image("", filesystem, writable, path, inherited)
    try:
        status = os.stat(f"fd/{number}", dir_fd=directory)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(status.st_mode) and not _is_memory(directory, number, path):
        return Image("", filesystem, writable, path, inherited)
    if not stat.S_ISBLK(status.st_mode):
        return None
    device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return Image(device, None, writable, path, inherited)


def _is_memory(directory: int, number: str, path: str) -> bool:
    """Return whether a file in tmpfs is the guest's memory, not an image. Raises OSError.

    A deleted file is memory. In /dev/shm, the content decides. The command line is not used,
    because it lacks images that were added through a monitor. Reading the content does not block,
    because tmpfs is in memory.
    """
    if path.endswith(" (deleted)"):
        return True
    if not path.startswith("/dev/shm/"):
        return False
    fd = os.open(f"fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        start = os.read(fd, _VDI_AT + len(_VDI))
    finally:
        os.close(fd)
    return not start.startswith(_FORMATS) and start[_VDI_AT:] != _VDI


def _flags_and_mount(directory: int, number: str) -> tuple[int, int]:
    """Read fdinfo. Raises ValueError if a value is missing, and OSError."""
    fd = os.open(f"fdinfo/{number}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        text = os.read(fd, _FDINFO_BYTES)
    finally:
        os.close(fd)
    fields = dict(line.partition(b":")[::2] for line in text.splitlines())
    return int(fields.get(b"flags", b""), 8), int(fields.get(b"mnt_id", b""))
