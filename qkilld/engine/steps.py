"""Divide long work, such as work for thousands of jobs, into steps, so that the loop can do other
work between the steps.

A user can make thousands of jobs end or change at the same time. The signals of other jobs must
still be on time.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

from qkilld.engine.fair_shares import user_of
from qkilld.engine.long_replies import STEP_S


class Steps:
    """The work of several users, who take turns. Root's work always comes first. Use this class in
    a running loop."""

    def __init__(self) -> None:
        self._due: OrderedDict[int, deque[Callable[[], bool]]] = OrderedDict()
        """The work for each user. The first user has the next turn, unless there is work for
        root."""
        self._end = 0.0
        """The end of the present step, by time.monotonic()."""
        self._step: asyncio.Handle | None = None

    def put(self, uid: int, work: Callable[[], bool]) -> None:
        """Call `work` soon, and repeat the call until it returns False. Other work of the same user
        waits until then."""
        self._due.setdefault(user_of(uid), deque()).append(work)
        self._continue()

    def add_time(self, seconds: float) -> None:
        """Count this time as used by the present step, because the step has started a task that
        takes this long."""
        self._end -= seconds

    def _continue(self) -> None:
        if self._due and self._step is None:
            self._step = asyncio.get_running_loop().call_soon(self._take_step)

    def _take_step(self) -> None:
        self._step = None
        self._end = time.monotonic() + STEP_S
        try:
            while self._due and time.monotonic() < self._end:
                self._work(0 if 0 in self._due else next(iter(self._due)))
        finally:
            self._continue()

    def _work(self, user: int) -> None:
        waiting = self._due[user]
        work = waiting.popleft()  # Work that raises an exception is not called again.
        try:
            if work():
                waiting.appendleft(work)
        finally:
            if waiting:
                self._due.move_to_end(user)
            else:
                del self._due[user]


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Steps] = WeakKeyDictionary()


def job_steps() -> Steps:
    """Return the Steps of the running loop. Jobs use them to handle timers and the exits of
    processes."""
    loop = asyncio.get_running_loop()
    steps = _of_loop.get(loop)
    if steps is None:
        steps = _of_loop[loop] = Steps()
    return steps
