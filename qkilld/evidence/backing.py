"""Find the file system under a loop device's backing file or an overlay's upper directory.

For both, the kernel shows only a path, and does not report in which mount namespace it is valid. So
a container's "/tmp/image" could be mistaken for a file on the host's root disk. To prevent this, a
path on a local file system is accepted only if it leads to the right kind of file: a loop device
needs a block device or a file of the right length, and an overlay needs a directory.
LOOP_GET_STATUS64 would return the file's device and inode, but it blocks if the file system hangs.

Paths that cross a remote file system or FUSE are never walked, because the walk could block.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import Filesystem, Mounts
from qkilld.adapters.target_files import open_path
from qkilld.debug_log import note_once
from qkilld.model.named_tuple import NamedTuple

TIMEOUT_S: Final = 0.5
"""Timeout for walking a path in a separate thread. In the right namespace, a walk is faster than
this, because the kernel has the directories in memory; in a wrong one, it may wait for a disk."""
MAX_FILES: Final = 256
"""The maximum number of files cached for each process."""
NAMESPACES: Final = ("1", "self")
"""A path is looked up in the mount namespaces of these processes, in this order."""

_LOCAL: Final = frozenset({"btrfs", "overlay", "zfs", "bcachefs", "tmpfs", "ramfs", "devtmpfs"})
"""Local file systems whose st_dev is not the number of a block device."""


class Backing(NamedTuple):
    """The backing file of a loop device, or the upper directory of an overlay."""

    path: bytes
    sizes: range | None
    """The possible sizes of the file in bytes; None for a directory."""


class BackingPlace(NamedTuple):
    filesystem: Filesystem | None
    device: str
    """MAJOR:MINOR if the backing file is itself a block device, "" otherwise."""


class BackingFinder:
    """Finds backing files, and caches them. Not thread-safe."""

    __slots__ = ("_answers", "_proc")

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._answers: dict[tuple[str, Backing], _FileSearch] = {}

    def find(self, backing: Backing, tables: dict[str, Mounts]) -> BackingPlace | None:
        """Return where the backing file lies; None if unknown. `tables`: the mounts of each process
        in NAMESPACES."""
        distant = None
        for pid in NAMESPACES:
            way = tables[pid].way_to(backing.path)
            if not way:
                continue
            if not all(_is_local(filesystem) for filesystem in way):
                distant = distant or BackingPlace(way[-1], "")
            elif (device := self._walk(pid, backing)) is not None:
                return BackingPlace(way[-1], device)
        return distant

    def _walk(self, pid: str, backing: Backing) -> str | None:
        """Return a value for BackingPlace.device; None if the file was not found in time."""
        search = self._answers.get((pid, backing))
        if search is None:
            if len(self._answers) >= MAX_FILES:
                return None
            search = _FileSearch(self._proc / pid / "root", backing)
            try:
                search.start()
            except RuntimeError as error:  # The system allows no more threads.
                note_once("looking for backing files", error)
                return None
            self._answers[pid, backing] = search
            search.join(TIMEOUT_S)
        return search.result


class _FileSearch(threading.Thread):
    """Walks one path. `result` is None until the file is found."""

    def __init__(self, root: Path, backing: Backing) -> None:
        super().__init__(name="backing", daemon=True)
        self._root, self._backing = root, backing
        self.result: str | None = None

    def run(self) -> None:
        try:
            self.result = _find_image(self._root, self._backing)
        except OSError as error:
            note_once(f"looking for {os.fsdecode(self._backing.path)!r} in {self._root}", error)


def _find_image(root: Path, backing: Backing) -> str | None:
    """Return a value for BackingPlace.device; None if the path leads to a file of another kind or
    size. Raises OSError."""
    file = open_path(root, os.fsdecode(backing.path))
    try:
        status = os.fstat(file)
    finally:
        os.close(file)
    if stat.S_ISBLK(status.st_mode):
        return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if stat.S_ISDIR(status.st_mode):
        same = backing.sizes is None
    else:
        same = stat.S_ISREG(status.st_mode) and status.st_size in (backing.sizes or ())
    return "" if same else None


def _is_local(filesystem: Filesystem) -> bool:
    return not filesystem.number.startswith("0:") or filesystem.kind in _LOCAL
