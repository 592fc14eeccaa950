"""Small files of the kernel's, read again and again.

A read of such a file through a descriptor that is kept costs 1 to 10 µs, opening and closing it
6 to 9 µs more (measured, kernel 6.18). A descriptor below /proc/PID belongs to that process alone:
it says ESRCH when the process is gone, whoever has its number then (proc(5), pidfd_open(2)).
"""

from __future__ import annotations

import os
from typing import Final

MOST: Final = 1 << 16
"""Bytes read of a file at most. The kernel gives a record of this kind whole in one read."""

GONE: Final = (FileNotFoundError, ProcessLookupError)
"""What opening or reading a file of a process raises when the process or thread is gone."""


def open_directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> int:
    """A descriptor of the directory. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)


def read_once(path: str | os.PathLike[str], dir_fd: int | None = None, most: int = MOST) -> bytes:
    """The first read of the file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


class KeptFile:
    """One file, whose descriptor is opened at the first read and kept."""

    __slots__ = ("_descriptor", "_dir_fd", "_path")

    def __init__(self, path: str | os.PathLike[str], dir_fd: int | None = None) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._descriptor = -1

    def read(self, most: int = MOST) -> bytes:
        """Its text now. Raises OSError; the next call then opens the file anew."""
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dir_fd)
        try:
            return os.pread(self._descriptor, most, 0)
        except OSError:
            self.close()
            raise

    def read_or_none(self) -> bytes | None:
        """The same, None where it cannot be read."""
        try:
            return self.read()
        except OSError:
            return None

    def close(self) -> None:
        """May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def number_after(text: bytes, label: bytes, base: int = 10) -> int | None:
    """The number between `label` and the end of its line; None where there is none."""
    at = text.find(label)
    if at < 0:
        return None
    at += len(label)
    end = text.find(b"\n", at)
    try:
        return int(text[at : end if end >= 0 else None], base)
    except ValueError:
        return None
