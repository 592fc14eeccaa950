"""Threads that take samples: as few as will do, more where one blocks in the kernel."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

STUCK_S: Final = 0.1
"""A call that takes longer blocks; whoever comes next does not wait for it."""
MAX_WORKERS: Final = 64
"""Each of them may be held by storage that is gone for good."""


class Workers:
    """One thread does it all as long as no call blocks. Idle, they wait without waking up."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._busy_since: dict[int, float] = {}
        self._count = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Have it called in some thread, soon; what it raises is lost."""
        self._queue.put(call)
        with self._lock:
            now = time.monotonic()
            stuck = all(now - since > STUCK_S for since in self._busy_since.values())
            if self._idle or not stuck or self._count >= MAX_WORKERS:
                return
            self._count += 1
            number = self._count
            self._busy_since[number] = now
        threading.Thread(
            target=self._work, args=(number,), name=f"sampler-{number}", daemon=True
        ).start()

    @property
    def waiting(self) -> bool:
        """Whether calls wait for a thread."""
        return not self._queue.empty()

    def close(self) -> None:
        """Let the threads end once they are idle; one that is blocked is left to itself."""
        with self._lock:
            for _ in range(self._count):
                self._queue.put(None)

    def _work(self, number: int) -> None:
        while True:
            with self._lock:
                self._busy_since.pop(number, None)
                self._idle += 1
            if (call := self._queue.get()) is None:
                return
            with self._lock:
                self._idle -= 1
                self._busy_since[number] = time.monotonic()
            with contextlib.suppress(Exception):
                call()
