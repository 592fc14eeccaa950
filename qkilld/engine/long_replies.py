"""Prepare long replies without blocking the loop.

One user alone may have 2,048 jobs, and encoding all properties of all users' jobs takes half a
second. Meanwhile, jobs must meet their deadlines, and systemd's watchdog must be notified in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final
from weakref import WeakValueDictionary

from qkilld.engine.fair_shares import user_of

STEP_S: Final = 0.002
"""How long a step may take before the loop serves its timers and pidfds."""
MAX_STEP_S: Final = 0.016
"""The longest step that `Pace.lengthen` can set."""


class Pace:
    """Divides long work into steps."""

    def __init__(self) -> None:
        self._step_s = STEP_S
        self._end = time.monotonic() + STEP_S

    def lengthen(self) -> None:
        """Double the length of the next steps, up to MAX_STEP_S."""
        self._step_s = min(2 * self._step_s, MAX_STEP_S)

    async def rest(self) -> None:
        """If this step has used up its time, let the loop do everything else that is due."""
        if time.monotonic() >= self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + self._step_s


class LongReplies:
    """Limits how many long replies are prepared at a time. Each user without limits may have one.
    All other users share one. Of several waiting calls of such a user, only one at a time stands in
    line with the calls of others."""

    def __init__(self, unlimited: frozenset[int]) -> None:
        self._unlimited = unlimited
        self._of_users = asyncio.Lock()
        self._of_user: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[Pace]:
        """Wait until a reply to this user may be prepared. The turn ends when the context exits."""
        own = self._of_user.setdefault(user_of(uid), asyncio.Lock())
        async with own:
            if uid in self._unlimited:
                yield Pace()
            else:
                async with self._of_users:
                    yield Pace()
