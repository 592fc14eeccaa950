"""Limit what one user may have running in the daemon at a time."""

from __future__ import annotations

import contextlib
import os
import resource
from collections import Counter
from enum import Enum
from typing import Final

from qkilld.model.errors import Busy


class Cost(Enum):
    """Kinds of calls with separate limits."""

    WAIT = "Wait"
    """Costs some memory as long as the job runs."""
    LOOK = "Inspect, Plan, ListGuests, ListJobs and GetManagedObjects"
    """Costs descriptors, threads and time."""
    OTHER = "other"


MAX_WAITS: Final = 1024
MAX_LOOKS: Final = 8
MAX_REQUESTS: Final = 64
"""The most calls other than Wait."""
RESERVE: Final = 4
"""This fraction of the descriptors is reserved for root's calls and running jobs."""


class CallLimits:
    def __init__(self, unlimited: frozenset[int]) -> None:
        """`unlimited` are the uids that have no limit."""
        self._unlimited = unlimited
        self._running: Counter[tuple[int, Cost]] = Counter()

    def begin(self, uid: int, cost: Cost) -> None:
        """Count a call; `end` must follow. Raises Busy."""
        if uid not in self._unlimited:
            self._check(uid, cost)
        self._running[uid, cost] += 1

    def end(self, uid: int, cost: Cost) -> None:
        self._running[uid, cost] -= 1
        if not self._running[uid, cost]:
            del self._running[uid, cost]

    def check_descriptors(self, uid: int) -> None:
        """Check before a call that opens descriptors. Raises Busy."""
        if uid not in self._unlimited and not _descriptors_to_spare():
            raise Busy("qkilld is short of file descriptors, and keeps the rest for running jobs")

    def _check(self, uid: int, cost: Cost) -> None:
        if cost is Cost.WAIT:
            if self._running[uid, cost] >= MAX_WAITS:
                raise Busy(f"Uid {uid} has {MAX_WAITS} calls of Wait open here, the most allowed")
            return
        if cost is Cost.LOOK and self._running[uid, cost] >= MAX_LOOKS:
            raise Busy(
                f"Uid {uid} has {MAX_LOOKS} calls of {cost.value} running here, the most allowed"
            )
        if self._running[uid, Cost.LOOK] + self._running[uid, Cost.OTHER] >= MAX_REQUESTS:
            raise Busy(f"Uid {uid} has {MAX_REQUESTS} calls running here, the most allowed")


def _descriptors_to_spare() -> bool:
    """Estimate from the lowest free descriptor number, below which all are in use."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        return fd < limit - limit // RESERVE
    return False
