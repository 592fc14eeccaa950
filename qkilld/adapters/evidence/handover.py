"""From the threads that take samples to the loop, many samples at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

LATEST_S: Final = 0.02
"""Within so long each is handed over, even if the sample after it blocks."""
AT_ONCE: Final = 4
"""So many are dealt with before the loop gets to look at its timers and pidfds again."""


class Handover:
    """Waking the loop costs as much as half a sample: it is woken for many.

    Make it in the running loop; all but `put` is for that.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self) -> None:
        """Something is on its way."""
        if self._timer is None:
            self._timer = self._loop.call_later(LATEST_S, self._deal)

    def put(self, call: Callable[[], None], *, more: bool) -> None:
        """Have it called in the loop; `more` comes soon. From any thread."""
        self._calls.append(call)
        if not more:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(self._deal)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _deal(self) -> None:
        self.close()
        for _ in range(min(AT_ONCE, len(self._calls))):
            self._calls.popleft()()
        if self._calls:
            self._loop.call_soon(self._deal)
