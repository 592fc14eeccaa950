"""Run the threads that take samples. Start another thread only if all others block in the
kernel."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from qkilld.adapters import blockable
from qkilld.debug_log import note_once
from qkilld.engine.fair_shares import FairShares, user_of
from qkilld.evidence.faults import FaultGuard

STUCK_S: Final = 0.1
"""A call that takes longer than this counts as blocked."""
MAX_BLOCKED: Final = 128
"""The maximum number of threads that may be blocked, for example because storage is dead."""
RESERVED_FOR_ROOT: Final = 16
MAX_SHARED: Final = 56
"""See FairShares. Dead storage often blocks many guests of one user."""
MAX_WORKERS: Final = MAX_BLOCKED + 1
"""The maximum number of workers: one more than may be blocked, so that one worker can run `instead`
(see submit)."""

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
        self._busy: dict[int, tuple[float, int | None]] = {}
        """For each busy worker: when it became busy, and the uid passed to `submit`, which is None
        for a worker that has just been started."""
        self._count = 0

    def submit(self, call: Call, *, uid: int, instead: Call, urgent: bool = False) -> None:
        """Run `call` soon in a worker. Urgent calls come first. The guard reports exceptions. If
        the blocked workers leave no room for a process of `uid`, run `instead`."""
        (self._urgent if urgent else self._others).append((call, instead, uid))
        self._wakeups.put(True)
        self.grow()

    def grow(self) -> None:
        """Add a worker if calls wait and all workers are blocked. If there is no worker and none
        can be started, a program that is allowed to block (qkilld-stop) runs the calls in this
        thread."""
        with self._lock:
            if self._idle or self._count >= MAX_WORKERS or not self.waiting:
                return
            now = time.monotonic()
            if any(now - since <= STUCK_S for since, _ in self._busy.values()):
                return
            number = self._count + 1
            try:
                threading.Thread(
                    target=self._work, args=(number,), name=f"sampler-{number}", daemon=True
                ).start()
            except RuntimeError as error:  # The system allows no more threads.
                note_once("starting a thread for samples", error)
            else:
                self._count = number
                self._busy[number] = (now, None)
            runs_here = not self._count and blockable.shared.may_block_caller
        while runs_here and self.waiting:
            self._wakeups.get()
            call, _, _ = (self._urgent or self._others).popleft()
            self._guard.call("working without a thread", call)

    @property
    def waiting(self) -> bool:
        """Return whether calls wait for a worker."""
        return bool(self._urgent or self._others)

    def blocked_by(self, uid: int) -> bool:
        """Return whether a process of this user blocks a worker."""
        with self._lock:
            return user_of(uid) in self._blocking()

    def close(self) -> None:
        """Let workers end when they are idle. Blocked workers are abandoned."""
        with self._lock:
            for _ in range(self._count):
                self._wakeups.put(False)

    def _work(self, number: int) -> None:
        while True:
            with self._lock:
                self._busy.pop(number, None)
                self._idle += 1
            if not self._wakeups.get():
                return
            with self._lock:
                call, instead, uid = (self._urgent or self._others).popleft()
                self._idle -= 1
                if not self._has_room(uid):
                    call = instead
                self._busy[number] = (time.monotonic(), uid)
            self._guard.call("working in a thread", call)

    def _has_room(self, uid: int) -> bool:
        """Return whether a call for a process of this user may block one more worker."""
        if not (blocking := self._blocking()):
            return True
        shares = FairShares(MAX_BLOCKED, of_root=RESERVED_FOR_ROOT, shared=MAX_SHARED)
        for user in blocking:
            shares.take(user)
        return shares.has_room(uid)

    def _blocking(self) -> list[int]:
        """Return the user of each process that blocks a worker."""
        now = time.monotonic()
        return [
            user_of(uid)
            for since, uid in self._busy.values()
            if uid is not None and now - since > STUCK_S
        ]
