"""Processes that nobody can identify, because they are in execve(2) and wait for a FUSE server.

While the kernel closes their O_CLOEXEC file, it holds a lock that every reader of their
/proc/PID/stat and exe needs (adapters.blockable).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGUSR1
from typing import Final

from tests.evidence.until import until
from tests.lab import needs
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.guest import Guest, scripted_qemu
from tests.lab.scratch import scratch

_SCRIPT: Final = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.open("{path}", os.O_RDONLY | os.O_CLOEXEC)
print("ready", flush=True)
signal.sigwait([signal.SIGUSR1])
program = os.readlink("/proc/self/exe")
os.execv(program, ["qemu", "-S", "-c", "import time; time.sleep(600)", "-name", "executed"])
"""


@dataclass
class StuckGuests:
    """Makes guests that ignore SIGTERM and can be made to execute their program again."""

    store: FuseStore
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def make(self, uid: int | None = None) -> Guest:
        script = _SCRIPT.format(path=self.store.directory / "file")
        return self.stack.enter_context(scripted_qemu(script, uid=uid))

    def stick(self, guest: Guest) -> None:
        """Make the guest execute its program. The execve(2) is stuck when it closes the file."""
        guest.signal(SIGUSR1)
        command_line = Path(f"/proc/{guest.pid}/cmdline")
        until(command_line.read_bytes, lambda words: not words)
        path = f"/proc/{guest.pid}/exe"
        reader = threading.Thread(target=os.path.exists, args=(path,), daemon=True)
        reader.start()
        reader.join(0.1)
        if not reader.is_alive():
            raise needs.Missing("this kernel shows a process in execve(2)")

    def make_stuck(self, uid: int | None = None) -> Guest:
        guest = self.make(uid)
        self.stick(guest)
        return guest

    def free(self) -> None:
        """Let all guests continue."""
        self.store.fast()


@contextlib.contextmanager
def stuck_guests() -> Iterator[StuckGuests]:
    """Raises needs.Missing without root or FUSE."""
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(scratch("f"))
        (files / "file").write_bytes(b"x")
        store = stack.enter_context(fuse_store(files))
        store.hang("flush")
        guests = StuckGuests(store)
        stack.enter_context(guests.stack)
        stack.callback(guests.free)  # SIGKILL does not end a flush, so let the flush end first.
        yield guests
