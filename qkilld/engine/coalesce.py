"""Share one run of a piece of work among all concurrent callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

PAUSE_FACTOR: Final = 3
"""The pause after a run is this many times as long as the run, but at most MAX_PAUSE_S. Without a
pause, constant requests would occupy the loop."""
MAX_PAUSE_S: Final = 0.1


class SharedRun(Generic[T]):
    """Callers that arrive while a run is in progress share the next run. They cannot share the
    current run: it may have begun before a change whose effect they want to see."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._running: asyncio.Task[T] | None = None
        self._next_run: asyncio.Task[T] | None = None
        self._pause_until = 0.0
        """The end of the pause after the last run, by the loop's clock."""

    async def get(self) -> T:
        """Return or raise the result of a run. The result is shared: do not modify it."""
        if self._next_run is None:
            self._next_run = asyncio.get_running_loop().create_task(self._run(self._running))
        # shield(): a caller that is cancelled must not cancel the run for the others.
        return await asyncio.shield(self._next_run)

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait((before,))
        loop = asyncio.get_running_loop()
        if (pause_s := self._pause_until - loop.time()) > 0:
            await asyncio.sleep(pause_s)
        start = loop.time()
        running = self._running = self._next_run
        self._next_run = None
        try:
            return await self._work()
        finally:
            now = loop.time()
            self._pause_until = now + min(MAX_PAUSE_S, PAUSE_FACTOR * (now - start))
            if self._running is running:
                self._running = None
