"""Pass callbacks from other threads to the main thread, which polls a descriptor."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable


class Mailbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        return self._read

    def put(self, what: Callable[[], None]) -> None:
        """Make the main thread call `what`. Thread-safe."""
        self._queue.put(what)
        # Ignore a full pipe, because it wakes the main thread anyway.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def work(self) -> None:
        try:
            os.read(self._read, 1 << 16)
        except BlockingIOError:
            return
        while not self._queue.empty():
            self._queue.get()()
