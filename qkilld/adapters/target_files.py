"""Open files as another process sees them, without following a link out of its root.

The target chooses the file systems that are accessed here, so every function may block forever.
Call these functions in a separate thread. Sources: path_resolution(7), proc_pid_root(5).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import PROC, Credentials, read_credentials

MAX_CONFIG: Final = 1 << 20
"""The maximum size of all -readconfig files together, in bytes."""
MAX_CONFIGS: Final = 16
"""The maximum number of -readconfig files of a process."""

MAX_PATH: Final = 4096
"""The maximum length of a path in bytes: the kernel's PATH_MAX."""
MAX_DEPTH: Final = 128
"""The maximum number of directories on the way to a file. Each takes a descriptor."""
MAX_STEPS: Final = 1024
"""The maximum number of names looked up for one file."""

_PATH: Final = os.O_PATH | os.O_CLOEXEC
_MAX_LINKS: Final = 40
"""The number of symbolic links that Linux follows for one path."""


def open_path(root: Path, path: str, directory: Path | None = None) -> int:
    """Open a file with O_PATH below `root`. A relative path begins in `directory`.

    This replaces openat2(2) with RESOLVE_IN_ROOT, which fails with ENOSYS under RestrictSUIDSGID=
    (measured, systemd 252). There are three differences: for a procfs link, the path that the link
    shows is followed; ".." does not lead out of `directory`; nothing is automounted. Raises
    OSError.
    """
    return _PathWalk(root, None if path.startswith("/") else directory).open(path)


def read_config(pid: int, path: str, proc: Path = PROC) -> str:
    """Read a -readconfig file of a process, if the process's user can read the file.

    The process chooses the path, so this function must not reveal a file that the process's user
    cannot read. Raises OSError. Raises ValueError if the file is not a regular one, or too long.
    """
    directory = proc / str(pid)
    user = read_credentials(pid, proc)
    file = _PathWalk(
        directory / "root", None if path.startswith("/") else directory / "cwd", user
    ).open(path)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is not a regular file")
        with Path(f"/proc/self/fd/{file}").open("rb") as content:
            text = content.read(MAX_CONFIG + 1)
    finally:
        os.close(file)
    if len(text) > MAX_CONFIG:
        raise ValueError("it is too long")
    return text.decode(errors="surrogateescape")


class _PathWalk:
    """Walks the path to one file, name by name, with a descriptor for each directory."""

    def __init__(self, root: Path, directory: Path | None, user: Credentials | None = None) -> None:
        """`user` must be permitted to walk the path and read the file. Raises OSError."""
        self._user = user
        self._places: list[int] = []
        try:
            for start in (root, directory):
                if start is not None:
                    self._enter(os.open(start, _PATH | os.O_DIRECTORY))
        except BaseException:
            self._leave_all()
            raise
        self._root_count = len(self._places)

    def open(self, path: str) -> int:
        """Call it once. Raises OSError."""
        try:
            _check(len(os.fsencode(path)) < MAX_PATH, errno.ENAMETOOLONG)
            self._go(path)
            self._check_access(stat.S_IRUSR)
            return self._places.pop()
        finally:
            self._leave_all()

    def _go(self, path: str) -> None:
        ahead, steps, links = path.split("/")[::-1], 0, 0
        while ahead:
            name = ahead.pop()
            if name == "..":
                # Go back to the parent, which is open. Opening ".." could lead elsewhere, because
                # the directory may have been moved.
                self._leave_to(max(self._root_count, len(self._places) - 1))
            if name in ("", ".", ".."):
                continue
            steps += 1
            _check(steps <= MAX_STEPS, errno.ELOOP)
            self._check_access(stat.S_IXUSR)
            self._enter(os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=self._places[-1]))
            if stat.S_ISLNK(os.fstat(self._places[-1]).st_mode):
                target = os.readlink("", dir_fd=self._places[-1])
                links += 1
                _check(links <= _MAX_LINKS, errno.ELOOP)
                if target.startswith("/"):
                    self._root_count = 1
                    self._leave_to(1)
                else:
                    self._leave_to(len(self._places) - 1)
                ahead += target.split("/")[::-1]

    def _check_access(self, wanted: int) -> None:
        """Raise OSError if the user does not have the `wanted` permission on the last directory or
        file."""
        if self._user is not None:
            status = os.fstat(self._places[-1])
            _check(self._user.may(wanted, status), errno.EACCES)

    def _enter(self, place: int) -> None:
        self._places.append(place)
        _check(len(self._places) <= MAX_DEPTH, errno.ELOOP)

    def _leave_to(self, count: int) -> None:
        while len(self._places) > count:
            os.close(self._places.pop())

    def _leave_all(self) -> None:
        self._leave_to(0)


def _check(good: bool, error: int) -> None:
    if not good:
        raise OSError(error, os.strerror(error))
