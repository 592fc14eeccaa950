"""CLOCK_MONOTONIC and the timers of the running loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from qkilld.model.words import USEC_PER_SEC


class LoopClock:
    """Implements engine.ports.Clock. asyncio's own clock is CLOCK_MONOTONIC too, in seconds.

    Make it in the running loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def now(self) -> int:
        return time.monotonic_ns() // 1000

    def call_at(self, when: int, callback: Callable[[], None]) -> asyncio.TimerHandle:
        # Rounded up: a timer that fires early would find its deadline not yet come.
        return self._loop.call_at((when + 1) / USEC_PER_SEC, callback)
