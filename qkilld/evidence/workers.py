"""Run the threads that take samples: as few as possible, more if one blocks in the kernel."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from qkilld.evidence.faults import FaultGuard

STUCK_S: Final = 0.1
"""A call that takes longer counts as blocked; later calls do not wait for it."""
MAX_WORKERS: Final = 64
"""The maximum number of worker threads. Dead storage may block each of them."""
MAX_PER_USER: Final = 48
"""The maximum number of workers that one user other than root may occupy. The rest is for other
users."""

Call = Callable[[], None]


class Workers:
    """Runs calls. Idle threads do not wake up."""

    def __init__(self, guard: FaultGuard) -> None:
        self._guard = guard
        self._urgent: deque[tuple[Call, Call, int]] = deque()
        self._others: deque[tuple[Call, Call, int]] = deque()
        self._wakeups: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """True for each waiting call; False ends a worker."""
        self._lock = threading.Lock()
        self._idle = 0
        self._busy_since: dict[int, float] = {}
        self._users: Counter[int] = Counter()
        """The number of workers that are busy with each user's processes."""
        self._count = 0

    def submit(self, call: Call, *, uid: int, instead: Call, urgent: bool = False) -> None:
        """Run `call` soon in a worker, urgent calls first; the guard reports exceptions. If `uid`
        occupies too many workers already, run `instead`."""
        (self._urgent if urgent else self._others).append((call, instead, uid))
        self._wakeups.put(True)
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
        """Return whether calls wait for a worker."""
        return bool(self._urgent or self._others)

    def close(self) -> None:
        """Let workers end when they are idle; blocked ones are abandoned."""
        with self._lock:
            for _ in range(self._count):
                self._wakeups.put(False)

    def _work(self, number: int) -> None:
        uid: int | None = None
        while True:
            with self._lock:
                self._busy_since.pop(number, None)
                self._idle += 1
                if uid is not None:
                    self._users[uid] -= 1
                    if not self._users[uid]:
                        del self._users[uid]
            if not self._wakeups.get():
                return
            with self._lock:
                call, instead, uid = (self._urgent or self._others).popleft()
                self._idle -= 1
                self._busy_since[number] = time.monotonic()
                if uid and self._users[uid] >= MAX_PER_USER:
                    call = instead
                self._users[uid] += 1
            self._guard.call("working in a thread", call)
