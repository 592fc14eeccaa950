"""CLOCK_MONOTONIC and the timers of the running loop."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections.abc import Callable

from qkilld.model.constants import USEC_PER_SEC


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
        # Use CLOCK_BOOTTIME: like clock ticks since boot, it includes the time in which the host
        # was suspended.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_time / os.sysconf("SC_CLK_TCK")
        return self.now() - int(age * USEC_PER_SEC)

    def call_at(self, when: int, callback: Callable[[], None]) -> asyncio.TimerHandle:
        # Round up, because a timer that fires early would find its deadline still in the future.
        # Share one context, because asyncio would make one for each timer.
        return self._loop.call_at((when + 1) / USEC_PER_SEC, callback, context=self._context)
