"""Read small files of the kernel repeatedly.

A read through an open descriptor costs 1 to 10 µs, opening and closing the file 6 to 9 µs more
(measured, kernel 6.18). A descriptor in /proc/PID belongs to that process: reading returns ESRCH
when the process is gone, even if its pid is reused (proc(5), pidfd_open(2)).

About ten files are kept open for each guest. When most descriptors that this program may have are
in use, files are closed after each read, so that enough descriptors remain for many more guests.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from qkilld.debug_log import note_once

MOST: Final = 1 << 16
"""Greatest number of bytes to read. The kernel returns the whole file in one read."""
_SHORT: Final = 4096

GONE: Final = (FileNotFoundError, ProcessLookupError)
"""Errors of opening or reading a file of a process or thread that is gone."""


class DescriptorShortage:
    """Detects a shortage of descriptors by the number of the last one that was opened: open(2)
    returns the lowest free number, so all lower numbers are in use."""

    def __init__(self) -> None:
        self.lasts = False

    def note(self, descriptor: int) -> None:
        """Take note of a new descriptor that is kept. The shortage begins at two thirds of the
        limit and ends at half of it, so that it does not begin and end with every file."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptor >= limit * 2 // 3:
            self.lasts = True
        elif descriptor < limit // 2:
            self.lasts = False


_shortage: Final = DescriptorShortage()


def descriptors_are_scarce() -> bool:
    """Return whether files must be closed even if they were not read this time."""
    return _shortage.lasts


def open_directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> int:
    """Open a directory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    _shortage.note(descriptor)
    return descriptor


def read_once(path: str | os.PathLike[str], dir_fd: int | None = None, most: int = MOST) -> bytes:
    """Open a file and read once. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


class KeptFile:
    """A file that is opened at the first read, and stays open unless descriptors are scarce."""

    __slots__ = ("_descriptor", "_dir_fd", "_path")

    def __init__(self, path: str | os.PathLike[str], dir_fd: int | None = None) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._descriptor = -1

    def read(self, most: int = MOST) -> bytes:
        """Return its current text. Raises OSError; the next call then opens the file again."""
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dir_fd)
            _shortage.note(self._descriptor)
        try:
            # Most files are short, and a text that is kept may occupy the whole buffer that it was
            # read into.
            text = os.pread(self._descriptor, min(most, _SHORT), 0)
            if len(text) >= _SHORT:
                text = os.pread(self._descriptor, most, 0)
        except OSError:
            self.close()
            raise
        if _shortage.lasts:
            self.close()
        return text

    def read_or_none(self) -> bytes | None:
        """Return its current text; None if it cannot be read."""
        try:
            return self.read()
        except OSError as error:
            note_once(f"reading {self._path}", error)
            return None

    def close(self) -> None:
        """May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


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
