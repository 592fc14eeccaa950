"""Limit how many calls each user may have open in the daemon at a time."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import Counter
from enum import Enum
from typing import Final

from qkilld.engine.fair_shares import user_of
from qkilld.model.errors import Busy


class Cost(Enum):
    """Kinds of calls with separate limits."""

    WAIT = "Wait"
    """A Wait needs some memory while the job runs."""
    READ = "Inspect, Plan, ListGuests, ListJobs and GetManagedObjects"
    """These calls need descriptors, threads and time."""
    OTHER = "other"


MAX_WAITS: Final = 1024
MAX_READS: Final = 8
MAX_REQUESTS: Final = 64
"""The maximum number of calls other than Wait, including up to MAX_READS of the kind READ."""
TOGETHER: Final = 32
"""The limits of one user, multiplied by this number, apply to all users other than root together.
One user can count as thousands, because of subordinate uids that /etc/subuid does not list. A Wait
takes 3 kB (measured), so all Waits together take at most 100 MB."""
RESERVE: Final = 4
"""A fourth of all descriptors is reserved for root's calls and for running jobs."""


class CallLimits:
    def __init__(self, unlimited: frozenset[int]) -> None:
        self._unlimited = unlimited
        self._running: Counter[tuple[int, Cost]] = Counter()
        self._total: Counter[Cost] = Counter()
        """The number of open calls of each kind, summed over all users who have limits."""

    def begin(self, uid: int, cost: Cost) -> None:
        """Count a call; `end` must follow. Raises Busy."""
        user = user_of(uid)
        if uid not in self._unlimited:
            self._check(user, cost)
            self._total[cost] += 1
        self._running[user, cost] += 1

    def end(self, uid: int, cost: Cost) -> None:
        if uid not in self._unlimited:
            self._total[cost] -= 1
        user = user_of(uid)
        self._running[user, cost] -= 1
        if not self._running[user, cost]:
            del self._running[user, cost]

    def check_descriptors(self, uid: int) -> None:
        """Raise Busy if too few descriptors are free for a call that opens some."""
        if uid not in self._unlimited and not _descriptors_to_spare():
            raise Busy("qkilld is short of file descriptors, and keeps the rest for running jobs")

    def _check(self, uid: int, cost: Cost) -> None:
        running, total = self._running, self._total
        if cost is Cost.WAIT:
            if running[uid, cost] >= MAX_WAITS:
                raise Busy(f"Uid {uid} has {MAX_WAITS} calls of Wait open here, the most allowed")
            _check_together(total[cost], MAX_WAITS, "calls of Wait")
            return
        if cost is Cost.READ:
            if running[uid, cost] >= MAX_READS:
                raise Busy(
                    f"Uid {uid} has {MAX_READS} calls of {cost.value} running here, the most "
                    "allowed"
                )
            _check_together(total[cost], MAX_READS, f"calls of {cost.value}")
        if running[uid, Cost.READ] + running[uid, Cost.OTHER] >= MAX_REQUESTS:
            raise Busy(f"Uid {uid} has {MAX_REQUESTS} calls running here, the most allowed")
        _check_together(total[Cost.READ] + total[Cost.OTHER], MAX_REQUESTS, "calls")


def _check_together(count: int, limit: int, what: str) -> None:
    """Raise Busy if all users together have too many calls (`count`). `limit` is the limit of one
    user."""
    if count >= TOGETHER * limit:
        raise Busy(
            f"Users other than root have {TOGETHER * limit} {what} open here, the most allowed for "
            "all of them together"
        )


def _descriptors_to_spare() -> bool:
    """Return whether a user's call may open descriptors. This is an estimate: descriptors above the
    lowest free one can be in use, too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        return fd < limit - limit // RESERVE
    return False
