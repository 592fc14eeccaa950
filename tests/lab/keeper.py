"""The keeper: if a lab is killed, this process kills everything that the lab has started.

    python -m tests.lab.keeper MARK SECONDS

This command is the keeper. Children normally die with their parent (process.spawn), but not if the
parent is stuck. For example, a hung FUSE server blocks all readers of its files forever, and every
sync(2) on the host, too. So the keeper waits for the end of its input, and SECONDS later it kills
all processes with MARK in their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.lab.process import TOP

_VARIABLE: Final = "QKILLD_LAB"
_GRACE_S: Final = 20.0
"""Time for processes to stop their children in an orderly way."""
_TRIES_S: Final = 30.0


class Keeper:
    """A context manager. All processes of the lab must be started within its context."""

    def __init__(self, grace: float = _GRACE_S) -> None:
        self._grace = grace
        self._write = -1
        self.pid = 0

    def __enter__(self) -> Keeper:
        mark = f"{os.getpid()}-{time.monotonic_ns():x}"
        read, self._write = os.pipe()
        # The keeper has its own session and no parent-death signal, because it must outlive this
        # process.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.keeper", mark, str(self._grace)],
            stdin=read,
            cwd=TOP,
            start_new_session=True,
        )
        os.close(read)
        self.pid = self._process.pid
        self._before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = mark
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(_VARIABLE)
        if self._before is not None:
            os.environ[_VARIABLE] = self._before
        if self._write >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._write, b"over")
            self.leave()
            self._process.wait()

    def leave(self) -> None:
        """Call this in a forked child, so that the end of the child does not count as the end of
        the lab."""
        os.close(self._write)
        self._write = -1


def _marked(mark: str) -> list[int]:
    """Return a pidfd of each process that has the mark in its environment."""
    wanted = f"{_VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry.name))
            # Read the environment while the pidfd is open, so that it belongs to the same process.
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(pidfd, 0)
                found.append(pidfd)
            else:
                os.close(pidfd)
    return found


def _end_all(mark: str, grace: float) -> None:
    began = time.monotonic()
    while (survivors := _marked(mark)) and time.monotonic() - began < grace + _TRIES_S:
        for pidfd in survivors:
            if time.monotonic() - began >= grace:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        time.sleep(0.2)


if __name__ == "__main__":
    if not sys.stdin.read():
        _end_all(sys.argv[1], float(sys.argv[2]))
