"""Write in a separate thread. A write may block forever, but must not keep the program from
exiting.

This module does not use asyncio, because the daemon imports asyncio late (qkilld.startup).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from qkilld.debug_log import note_once

T = TypeVar("T")

FLUSH_TIMEOUT_S: Final = 2.0


class BackgroundWriter(Generic[T]):
    """Writes items in order, in its own thread.

    Items are written to disks, the journal and systemd, and each of them may hang. Guests must
    still be stopped, so no method raises, and only `close` blocks.
    """

    def __init__(self, name: str, write: Callable[[T], None], limit: int | None) -> None:
        """For each item, call `write` in a thread called `name`. Exceptions of `write` are ignored.

        `limit` is the maximum number of queued items; None if the caller limits them.
        """
        self._name = name
        self._write = write
        self._limit = limit
        self._closed = False
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        """None if the system allows no more threads. `put` and `close` then try again to start the
        thread."""
        self._start()

    def put(self, item: T, *, always: bool = False) -> bool:
        """Queue an item. If the queue is full, drop the item and return False, unless `always` is
        true."""
        if not always and self._limit is not None and self._queue.qsize() >= self._limit:
            return False
        self._queue.put(item)
        self._start()
        return True

    def close(self) -> bool:
        """Wait up to FLUSH_TIMEOUT_S until the queued items are written; return whether all were.

        Can be called again.
        """
        self._start()
        self._closed = True
        if self._thread is None:
            return self._queue.empty()
        self._queue.put(None)  # Wakes the thread.
        self._thread.join(FLUSH_TIMEOUT_S)
        return not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            note_once(f"starting a thread to write to {self._name}", error)
        else:
            self._thread = thread

    def _work(self) -> None:
        while not (self._closed and self._queue.empty()):
            item = self._queue.get()
            if item is not None:
                try:
                    self._write(item)
                except Exception as error:
                    # Log this only once: if it is the debug log that cannot be written, writing
                    # this line fails, too, and would cause another line.
                    note_once(f"writing to {self._name}", error)
