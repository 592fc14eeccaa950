"""CLOCK_MONOTONIC and the timers of the running loop."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections.abc import Callable

from qkilld.engine.steps import job_steps
from qkilld.model.constants import USEC_PER_SEC


class UserTimer:
    """A timer that, when it expires, queues its callback as work of one user (engine.steps).
    Implements engine.ports.Timer."""

    __slots__ = ("_callback", "_user", "handle")

    def __init__(self, user: int, callback: Callable[[], None]) -> None:
        self._user = user
        self._callback: Callable[[], None] | None = callback
        self.handle: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        self._callback = None
        if self.handle is not None:
            self.handle.cancel()

    def expire(self) -> None:
        self.handle = None  # Break the reference cycle: the handle refers to this object.
        job_steps().put(self._user, self._call_back)

    def _call_back(self) -> bool:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
        return False


class LoopClock:
    """Implements engine.ports.Clock. asyncio's own clock is also CLOCK_MONOTONIC, in seconds.

    Create it in the running loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()

    def now(self) -> int:
        return time.monotonic_ns() // 1000

    def started_at(self, start_time: int) -> int:
        # Use CLOCK_BOOTTIME, because it includes the time in which the host was suspended, as
        # `start_time` does.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_time / os.sysconf("SC_CLK_TCK")
        return self.now() - int(age * USEC_PER_SEC)

    def call_at(
        self, when: int, callback: Callable[[], None], user: int | None = None
    ) -> asyncio.TimerHandle | UserTimer:
        if user is not None:
            timer = UserTimer(user, callback)
            timer.handle = self._call_at(when, timer.expire)
            return timer
        return self._call_at(when, callback)

    def _call_at(self, when: int, callback: Callable[[], None]) -> asyncio.TimerHandle:
        # Round up: if the timer fired early, the deadline would still be in the future. Share one
        # context, because asyncio would otherwise copy one for each timer.
        return self._loop.call_at((when + 1) / USEC_PER_SEC, callback, context=self._context)
