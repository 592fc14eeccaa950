"""Hand samples over to the loop, in batches, from the threads that take them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_DELAY_S: Final = 0.02
"""The longest time a complete sample waits to be handed over with the next one. The wait is limited
because taking the next one may block."""
AT_ONCE: Final = 4
"""The number of samples handled before the loop checks its timers and pidfds again."""


class Handover:
    """Collects the calls that hand over samples, because each wake-up of the loop costs half as
    much as a sample.

    Create it in the running loop. Only `put` may be called in other threads.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._urgent: deque[Callable[[], None]] = deque()
        self._others: deque[Callable[[], None]] = deque()
        self._next: asyncio.Handle | None = None
        """The next run of `_deal`, not counting those that `put` has scheduled."""

    def expect(self) -> None:
        """Make the loop run all collected calls after MAX_DELAY_S, including those added until
        then."""
        if self._next is None:
            self._next = self._loop.call_later(MAX_DELAY_S, self._deal)

    def put(self, call: Callable[[], None], *, more: bool, urgent: bool = False) -> bool:
        """Make the loop run `call`. If the call is urgent, or no other call follows soon (`more` is
        false), the loop runs it at once; otherwise, together with a later call or after
        MAX_DELAY_S. Return False if the loop is closed. Thread-safe."""
        (self._urgent if urgent else self._others).append(call)
        try:
            if urgent or not more:
                self._loop.call_soon_threadsafe(self._deal)
            elif self._next is None:
                # The run that `expect` had scheduled is over. Schedule another, because taking the
                # next sample may block, and then no later `put` would hand this call over.
                self._loop.call_soon_threadsafe(self.expect)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _deal(self) -> None:
        self.close()
        try:
            for _ in range(AT_ONCE):
                if not (calls := self._urgent or self._others):
                    break
                calls.popleft()()
        finally:
            # Schedule the other calls even if this call has raised an exception: nothing else does
            # so.
            if self._urgent or self._others:
                self.close()
                self._next = self._loop.call_soon(self._deal)
