"""Run a program on a pseudo-terminal of any size, read its output and send it keys."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.process import end, spawn

_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """The output of a program on a pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.text = ""
        self._seen = 0

    @property
    def plain(self) -> str:
        """The text without escape sequences."""
        return _SEQUENCE.sub("", self.text)

    def wait_for(self, pattern: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.text):
            assert self._read(max(0.0, deadline - time.monotonic())), self.text

    def wait_for_new(self, pattern: str, timeout: float = 30) -> None:
        """Wait for a match in the plain text that was printed since the last call."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.plain[self._seen :])):
            assert self._read(max(0.0, deadline - time.monotonic())), self.plain[self._seen :]
        self._seen += found.end()

    def read_to_end(self, timeout: float = 30) -> None:
        while self._read(timeout):
            pass

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], timeout)
        assert ready, self.text
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # EIO: the other end is closed.
            return False
        self.text += data.decode(errors="replace")
        return bool(data)


@dataclass
class OnTerminal:
    """A program with a terminal as its output and, if requested, as its input."""

    process: subprocess.Popen[bytes]
    screen: Screen
    slave: int
    """The program's end of the terminal; -1 if it is not kept open."""

    def settings(self) -> list[Any]:
        """Return the settings as termios(3) describes them."""
        return termios.tcgetattr(self.slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextlib.contextmanager
def on_terminal(
    argv: Sequence[str | Path],
    env: Mapping[str, str],
    *,
    size: tuple[int, int] = (100, 24),
    keys: bool = False,
) -> Iterator[OnTerminal]:
    """Run a program on a terminal. `keys`: the terminal is also the program's input, and stays open
    when the program ends."""
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        stdin = theirs if keys else subprocess.DEVNULL
        process = spawn(argv, stdin=stdin, stdout=theirs, stderr=theirs, env=env)
    except BaseException:
        os.close(ours)
        os.close(theirs)
        raise
    if not keys:
        os.close(theirs)
    try:
        yield OnTerminal(process, Screen(ours), theirs if keys else -1)
    finally:
        end(process)
        os.close(ours)
        if keys:
            os.close(theirs)
