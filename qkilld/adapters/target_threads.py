"""Threads for operations that a target may block forever, through its file systems or its memory
lock.

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
from qkilld.engine.fair_shares import FairShares
from qkilld.model.guest import Identity

T = TypeVar("T")

MAX_OF_TARGET: Final = 2
MAX_THREADS: Final = 96
RESERVED_FOR_ROOT: Final = 32
MAX_SHARED: Final = 32
"""See FairShares."""


class AllThreadsBlocked(Exception):
    """All allowed threads are in use."""


class TargetThreads:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._targets: Counter[Hashable] = Counter()
        self._users = FairShares(MAX_THREADS, of_root=RESERVED_FOR_ROOT, shared=MAX_SHARED)

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
        """Reserve a place for one thread. The caller starts the thread within the context. Raises
        AllThreadsBlocked."""
        with self._lock:
            if not self._has_room(target, uid):
                raise AllThreadsBlocked
            self._targets[target] += 1
            self._users.take(uid)
        try:
            yield
        except RuntimeError:  # The system allows no more threads.
            self._leave(target, uid)
            raise AllThreadsBlocked from None

    def _leave(self, target: Hashable, uid: int) -> None:
        with self._lock:
            self._targets -= Counter((target,))
            self._users.give_back(uid)

    def _has_room(self, target: Hashable, uid: int) -> bool:
        return self._targets[target] < MAX_OF_TARGET and self._users.has_room(uid)


shared: Final = TargetThreads()
"""The threads of the whole program. They are counted together, because TasksMax= limits the sum of
all threads of the unit."""
