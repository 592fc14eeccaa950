"""Prepare replies that grow with the number of jobs or guests, without blocking the loop.

One user alone may have 2,048 jobs, and a reply with all properties of all users' jobs takes half a
second to encode. Meanwhile, no job may miss a deadline and no watchdog a notification.
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
"""After this time, the loop serves its timers and pidfds."""
MAX_STEP_S: Final = 0.016
"""The longest step of work that has to keep up with changes."""


class Pace:
    """Divides long work into steps of STEP_S."""

    def __init__(self) -> None:
        self._step_s = STEP_S
        self._end = time.monotonic() + STEP_S

    def lengthen(self) -> None:
        """Double the length of the next steps, up to MAX_STEP_S."""
        self._step_s = min(2 * self._step_s, MAX_STEP_S)

    async def rest(self) -> None:
        """Let the loop do everything else that is due, if this step has taken its time."""
        if time.monotonic() >= self._end:
            await asyncio.sleep(0)
            self._end = time.monotonic() + self._step_s


class LongReplies:
    """Lets one reply at a time be prepared for all users together who have limits, and one for each
    other user. Users with several waiting calls get a turn for one of them."""

    def __init__(self, unlimited: frozenset[int]) -> None:
        """`unlimited`: uids without limits."""
        self._unlimited = unlimited
        self._of_users = asyncio.Lock()
        self._of_user: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[Pace]:
        """Wait until a reply to this user may be prepared."""
        own = self._of_user.setdefault(user_of(uid), asyncio.Lock())
        async with own:
            if uid in self._unlimited:
                yield Pace()
            else:
                async with self._of_users:
                    yield Pace()
