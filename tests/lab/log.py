"""Wait for files and for text in files: a guest's serial line, a daemon's stderr, a socket."""

from __future__ import annotations

import ctypes
import os
import re
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

_IN_MODIFY: Final = 0x2
_IN_CREATE: Final = 0x100
_IN_MOVED_TO: Final = 0x80
_IN_CLOEXEC: Final = os.O_CLOEXEC
_libc: Final = ctypes.CDLL(None, use_errno=True)


_T = TypeVar("_T")


class WaitTimeout(AssertionError):
    """A wait timed out."""


def wait_for_path(path: Path, timeout: float, *, pidfd: int | None = None) -> None:
    """Wait until `path` exists. Raises WaitTimeout at the timeout, or if the process of `pidfd`
    ends."""
    _watch(
        path.parent,
        _IN_CREATE | _IN_MOVED_TO,
        lambda: path.exists() or None,
        timeout,
        pidfd,
        lambda: f"a file {path.name}",
    )


class Log:
    """A text file to which a process writes."""

    def __init__(self, path: Path) -> None:
        """Creates the file if it is missing."""
        self.path = path
        path.touch()

    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def lines(self) -> list[str]:
        return self.text().splitlines()

    def wait_for(
        self, pattern: str, timeout: float = 60, *, pidfd: int | None = None, since: int = 0
    ) -> re.Match[str]:
        """Wait for a match of `pattern` (re.MULTILINE) after the first `since` characters; return
        the match.

        `pidfd` is the writer's pidfd. Raises WaitTimeout with the text so far after `timeout`
        seconds, or if the writer ends without a match.
        """
        expression = re.compile(pattern, re.MULTILINE)
        return _watch(
            self.path,
            _IN_MODIFY,
            lambda: expression.search(self.text(), since),
            timeout,
            pidfd,
            lambda: f"{pattern!r} in {self.path.name}, which reads:\n{self.text()}",
        )


def _watch(
    path: Path,
    events: int,
    look: Callable[[], _T | None],
    timeout: float,
    pidfd: int | None,
    wanted: Callable[[], str],
) -> _T:
    """Call `look` now and after each of these inotify events at `path`, until it returns a result.
    Return that result."""
    deadline = time.monotonic() + timeout
    watch = _libc.inotify_init1(_IN_CLOEXEC)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    try:
        if _libc.inotify_add_watch(watch, os.fsencode(path), events) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
        sources = [watch] if pidfd is None else [watch, pidfd]
        ended = False
        while True:
            if (found := look()) is not None:
                return found
            remaining = deadline - time.monotonic()
            if ended or remaining <= 0:
                why = "the process ended" if ended else f"{timeout} s went by"
                raise WaitTimeout(f"{why} without {wanted()}")
            ready, _, _ = select.select(sources, [], [], remaining)
            if watch in ready:
                os.read(watch, 65536)
            ended = pidfd in ready
    finally:
        os.close(watch)
