"""Threads for operations that a target may block forever, by its file systems or its memory lock.

A thread that is blocked in the kernel cannot be ended, so the number of threads is limited for each
target and each user.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Final, TypeVar

from qkilld.adapters.loop_thread import run_in_thread
from qkilld.model.guest import Identity

T = TypeVar("T")

MAX_OF_TARGET: Final = 2
MAX_OF_USER: Final = 16
"""Threads for the processes of one user other than root."""
MAX_OF_USERS: Final = 64
"""Threads for the processes of all users except root."""
MAX_THREADS: Final = 96


class AllThreadsBlocked(Exception):
    """All allowed threads are in use."""


class TargetThreads:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._targets: Counter[Hashable] = Counter()
        self._users: Counter[int] = Counter()

    def run(self, target: Identity, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` in a thread; the future gets its result or exception.

        Call it in a running loop. Raises AllThreadsBlocked.
        """

        def work() -> T:
            try:
                return function()
            finally:
                self._leave(target.key, target.uid)

        with self._place(target.key, target.uid):
            return run_in_thread(work)

    def start(self, pid: int, uid: int, function: Callable[[], object]) -> threading.Thread:
        """Run `function` in a thread. Raises AllThreadsBlocked."""

        def work() -> None:
            try:
                function()
            finally:
                self._leave(pid, uid)

        with self._place(pid, uid):
            thread = threading.Thread(target=work, name=f"target-{pid}", daemon=True)
            thread.start()
            return thread

    @contextlib.contextmanager
    def _place(self, target: Hashable, uid: int) -> Iterator[None]:
        """Reserve a place for a thread that is started in the context. Raises AllThreadsBlocked."""
        with self._lock:
            if not self._has_room(target, uid):
                raise AllThreadsBlocked
            self._targets[target] += 1
            self._users[uid] += 1
        try:
            yield
        except RuntimeError:  # The system allows no more threads.
            self._leave(target, uid)
            raise AllThreadsBlocked from None

    def _leave(self, target: Hashable, uid: int) -> None:
        with self._lock:
            self._targets -= Counter((target,))
            self._users -= Counter((uid,))

    def _has_room(self, target: Hashable, uid: int) -> bool:
        total = self._users.total()
        if self._targets[target] >= MAX_OF_TARGET or total >= MAX_THREADS:
            return False
        others = total - self._users[0]
        return uid == 0 or (self._users[uid] < MAX_OF_USER and others < MAX_OF_USERS)


shared: Final = TargetThreads()
"""The threads of the whole program. They are counted together, because TasksMax= limits all threads
of its unit."""
