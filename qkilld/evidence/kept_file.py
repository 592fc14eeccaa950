"""Read small files of the kernel repeatedly.

The files stay open, because opening and closing a file costs 6 to 9 µs, about as much as reading it
(1 to 10 µs, measured on kernel 6.18). A descriptor of a file in /proc/PID refers to that process
for good: when the process is gone, reading fails with ESRCH, even if the pid is reused (proc(5),
pidfd_open(2)).

About ten files are kept open for each guest, as long as file_budget.py has room for them.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from qkilld.debug_log import note_once

MOST: Final = 1 << 16
"""The maximum number of bytes to read. The kernel returns the whole file in one read."""
_SHORT: Final = 4096

EXITED: Final = (FileNotFoundError, ProcessLookupError)
"""The errors of opening or reading a file in /proc if its process or thread is gone."""


class _Count:
    """The number of files that are kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


_count: Final = _Count()


def kept_files() -> int:
    """Return how many files this program keeps open between reads."""
    return _count.value


def count_kept(number: int) -> None:
    """Make `kept_files` count `number` more descriptors, which belong to no KeptFile; `number` is
    negative if such descriptors were closed."""
    _count.add(number)


def open_directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> int:
    """Open a directory. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)


def read_once(path: str | os.PathLike[str], dir_fd: int | None = None, most: int = MOST) -> bytes:
    """Open a file and read once. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


class KeptFile:
    """A file that is opened at the first read, and stays open until `close`."""

    __slots__ = ("_descriptor", "_dir_fd", "_path")

    def __init__(self, path: str | os.PathLike[str], dir_fd: int | None = None) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._descriptor = -1

    def read(self, most: int = MOST) -> bytes:
        """Return the file's current text. Raises OSError; the next call then opens the file
        again."""
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dir_fd)
            _count.add(1)
        try:
            # Try a short buffer first: most files are short, and if a caller stores the text, the
            # whole buffer may stay in memory.
            text = os.pread(self._descriptor, min(most, _SHORT), 0)
            if len(text) >= _SHORT:
                text = os.pread(self._descriptor, most, 0)
        except OSError:
            self.close()
            raise
        return text

    def read_or_none(self) -> bytes | None:
        """Return the file's current text; None if it cannot be read."""
        try:
            return self.read()
        except OSError as error:
            note_once(f"reading {self._path}", error)
            return None

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def close(self) -> None:
        """Close the file; the next read opens it again. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _count.add(-1)


def number_after(text: bytes, label: bytes, base: int = 10) -> int | None:
    """Return the number between `label` and the end of its line; None if there is none."""
    at = text.find(label)
    if at < 0:
        return None
    at += len(label)
    end = text.find(b"\n", at)
    try:
        return int(text[at : end if end >= 0 else None], base)
    except ValueError:
        return None
