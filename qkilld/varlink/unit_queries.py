"""Limit how often systemd is asked about the units of callers (`byUnit`).

Any user can start such a query with each call, and all queries use the daemon's only connection to
the bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final
from weakref import WeakValueDictionary

from qkilld.engine.call_limits import CallLimits, Cost
from qkilld.engine.fair_shares import FIRST_SUBORDINATE, FairShares, user_of
from qkilld.engine.job import Job
from qkilld.engine.unit_stop import UnitLimits, UnitStops
from qkilld.model.errors import Busy

MAX_AT_ONCE: Final = 16
"""How many queries may run at a time. Each waits for one reply of systemd. The system bus allows a
connection 128 pending replies: requests to polkit may take 64 of them (polkit.MAX_IN_ALL), and
requests for the uids of callers may take 32 (server.MAX_ASKING)."""
MAX_SHARED: Final = 8
OF_ROOT: Final = 4
"""See FairShares."""


class UnitQueries:
    def __init__(self, units: UnitStops, limits: CallLimits) -> None:
        self._units = units
        self._limits = limits
        self._places = FairShares(MAX_AT_ONCE, of_root=OF_ROOT, shared=MAX_SHARED)
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}
        """The queries that wait for a place, by uid. The first uid gets the next free place."""
        self._locks: WeakValueDictionary[tuple[int, str, tuple[int, ...]], asyncio.Lock] = (
            WeakValueDictionary()
        )
        """One lock for each combination of user, unit and set of jobs: it allows one query at a
        time. Users do not share a lock: root's query must not wait for a thousand queries of the
        guest's owner about the same unit."""

    async def limit(self, jobs: Sequence[Job], pid: int, uid: int, *, force: bool) -> UnitLimits:
        """Wait for a place, then do what UnitStops.limit does. If the user has too many queries,
        return no limits."""
        # Count a query like a call of Wait, because it may wait even after its client has left.
        try:
            self._limits.begin(uid, Cost.WAIT)
        except Busy as error:
            return UnitLimits("", None, str(error))
        try:
            key = uid, self._units.reason(pid), tuple(job.number for job in jobs)
            lock = self._locks.get(key)
            if lock is None:
                lock = self._locks[key] = asyncio.Lock()
            async with lock, self._place(uid):
                if not any(job.running for job in jobs):
                    return UnitLimits("", None, "the stop has ended")
                return await self._units.limit(jobs, pid, uid, force=force)
        finally:
            self._limits.end(uid, Cost.WAIT)

    @contextlib.asynccontextmanager
    async def _place(self, uid: int) -> AsyncIterator[None]:
        """Wait for one of the MAX_AT_ONCE places."""
        uid = user_of(uid)
        if uid in self._waiting or not self._places.has_room(uid):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(uid, deque()).append(turn)
            await turn
        else:
            self._places.take(uid)
        try:
            yield
        finally:
            self._places.give_back(uid)
            self._hand_out()

    def _hand_out(self) -> None:
        """Give free places to waiting queries."""
        # Try root, and MAX_AT_ONCE + 1 users of each kind (subordinate or not). Trying more would
        # be in vain: at most MAX_AT_ONCE users have a place, so at least one of those tried has
        # none. If that user gets no place, no other user of the same kind would get one.
        uids = [0]
        for is_subordinate in (False, True):
            kind = (
                uid
                for uid in self._waiting
                if uid != 0 and (uid >= FIRST_SUBORDINATE) is is_subordinate
            )
            uids += itertools.islice(kind, MAX_AT_ONCE + 1)
        for uid in uids:
            turns = self._waiting.pop(uid, None)
            while turns and self._places.has_room(uid):
                turn = turns.popleft()
                if not turn.done():
                    self._places.take(uid)
                    turn.set_result(None)
            if turns:
                self._waiting[uid] = turns
