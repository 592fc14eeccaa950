"""Start the calls of users, who take turns.

The bus and Varlink share one Turns object, so that all calls of a user count together.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from qkilld.engine.call_limits import CallLimits
from qkilld.engine.fair_queue import MAX_CALLS, FairQueue
from qkilld.engine.long_replies import LongReplies
from qkilld.model.errors import Busy, QkilldError

ROUND_S: Final = 0.002
"""How long to start calls before the loop serves its timers and pidfds."""
CROWDED_S: Final = 0.002
"""If calls still arrive while the queue is crowded (FairQueue.crowded), read messages for this long
without starting calls. Without this pause, another user's call would wait behind these calls in the
socket."""
FULL: Final = Busy(f"You have more than {MAX_CALLS} calls, or too long ones, that wait for a reply")


class WaitingCall(Protocol):
    """A call that was received but not parsed yet."""

    def start(self, uid: int) -> None:
        """Answer the call, or start a task that answers it. Never raises."""

    def refuse(self, error: QkilldError) -> None: ...


class Turns:
    """Use this class in a running loop. Each client of D-Bus or Varlink has a name, which is never
    used for another client."""

    def __init__(self, unlimited: frozenset[int]) -> None:
        self.unlimited = unlimited
        self.limits = CallLimits(unlimited)
        self.long_replies = LongReplies(unlimited)
        self.last_call = time.monotonic()
        """The time of the last call, by time.monotonic()."""
        self._queue: FairQueue[WaitingCall] = FairQueue(unlimited)
        self._round: asyncio.Handle | None = None
        self._has_new_calls = False
        """Whether calls have arrived since the last round."""

    @property
    def waiting(self) -> bool:
        """Whether a call of a known user waits for its turn."""
        return bool(self._queue)

    def put(self, name: str, uid: int | None, call: WaitingCall, size: int) -> bool:
        """Let a call wait for its user's turn. If `uid` is None, the call waits for `introduce`. If
        too many calls wait, refuse the call and return False."""
        self.last_call = time.monotonic()
        self._has_new_calls = True
        if not self._queue.put(name, uid, call, size):
            call.refuse(FULL)
            return False
        if uid is not None:
            self._serve_soon()
        return True

    def introduce(self, name: str, uid: int) -> None:
        self._queue.introduce(name, uid)
        self._serve_soon()

    def forget(self, name: str, uid: int | None) -> list[WaitingCall]:
        """Remove a caller that has disconnected; return its waiting calls."""
        return self._queue.forget(name, uid)

    def _serve_soon(self) -> None:
        if isinstance(self._round, asyncio.TimerHandle) and not self._queue.crowded:
            self._round.cancel()
            self._round = None
        if self._round is None:
            self._round = asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        """Give each user a turn while time remains. The next round follows when the loop has
        handled other events, and the tasks started here have begun."""
        self._round = None
        called, self._has_new_calls = self._has_new_calls, False
        end = time.monotonic() + ROUND_S
        for _ in range(self._queue.users):
            for uid, call in self._queue.turn():
                call.start(uid)
            if time.monotonic() > end:
                break
        if not self._queue:
            return
        if self._queue.crowded and called:
            self._round = asyncio.get_running_loop().call_later(CROWDED_S, self._serve)
        else:
            self._serve_soon()
