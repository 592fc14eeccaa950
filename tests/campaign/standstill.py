"""Block QEMU itself instead of its storage: by a signal, a freezer, a debugger or a full pipe.

    python -m tests.campaign.standstill TID...

This command stops the threads like a debugger, prints "held", and releases them at the end of its
input.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tests.campaign.noise import parents
from tests.lab.bare import BareGuest
from tests.lab.groups import temporary_group
from tests.lab.process import TOP, end, spawn

_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_WAIT_ALL: Final = 0x40000000
"""__WALL of waitpid(2): wait for threads, too."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


class FullPipe:
    """A pipe. Between `fill` and `drain`, it is full and not read. At other times, it is read."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, 4096)
        self._thread: threading.Thread | None = None

    def fill(self) -> None:
        os.set_blocking(self.write, False)
        # A short write is done in full or not at all, so the last bytes are written one by one.
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(self.write, b"x" * size)
        os.set_blocking(self.write, True)

    def drain(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_all, daemon=True)
            self._thread.start()

    def _read_all(self) -> None:
        while os.read(self._read, 65536):
            pass

    def close(self) -> None:
        """Close the pipe. Call this when the writer has exited or is running again."""
        self.drain()
        os.close(self.write)
        assert self._thread is not None
        self._thread.join(30)
        os.close(self._read)


class Standstill:
    """Blocks one QEMU, until `go` or the end of `stack`."""

    def __init__(self, guest: BareGuest, pipe: FullPipe | None, stack: contextlib.ExitStack):
        self._guest, self._pipe, self._stack = guest, pipe, stack
        self._undo: list[Callable[[], object]] = []

    def apply(self, what: str) -> None:
        match what:
            case "stop":
                self._guest.signal(signal.SIGSTOP)
                self._undo.append(lambda: self._guest.signal(signal.SIGCONT))
            case "frozen":
                self._freeze()
            case "trace":
                self._trace()
            case "pipe":
                assert self._pipe is not None
                self._pipe.fill()
                self._undo.append(self._pipe.drain)
            case "kill":
                self._guest.signal(signal.SIGKILL)
            case "go":
                self.go()

    def go(self) -> None:
        while self._undo:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                self._undo.pop()()

    def _freeze(self) -> None:
        (parent,) = parents("freezer")
        group = self._stack.enter_context(temporary_group(parent))
        (group / "cgroup.procs").write_text(str(self._guest.pid))
        control, frozen, thawed = (
            (group / "freezer.state", "FROZEN", "THAWED")
            if (group / "freezer.state").exists()
            else (group / "cgroup.freeze", "1", "0")
        )
        control.write_text(frozen)
        self._undo.append(lambda: control.write_text(thawed))

    def _trace(self) -> None:
        threads = (int(entry.name) for entry in Path(f"/proc/{self._guest.pid}/task").iterdir())
        tracer = trace(threads)
        self._stack.callback(end, tracer)
        self._undo.append(lambda: end(tracer))


def trace(threads: Iterable[int]) -> subprocess.Popen[bytes]:
    """Start and return a process that keeps these threads stopped as long as it runs."""
    argv = [sys.executable, "-m", "tests.campaign.standstill", *map(str, threads)]
    tracer = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TOP)
    assert tracer.stdout is not None
    assert tracer.stdout.readline() == b"held\n", "the threads cannot be traced"
    return tracer


def hold(threads: Iterable[int]) -> None:
    """Trace and stop these threads."""
    for thread in threads:
        if _libc.ptrace(_SEIZE, thread, 0, 0):
            raise OSError(ctypes.get_errno(), f"PTRACE_SEIZE of thread {thread}")
        _libc.ptrace(_INTERRUPT, thread, 0, 0)
        os.waitpid(thread, _WAIT_ALL)


if __name__ == "__main__":
    hold(map(int, sys.argv[1:]))
    print("held", flush=True)
    sys.stdin.read()
    # When a tracer ends, the kernel releases its tracees.
