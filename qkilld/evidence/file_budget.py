"""Decide which guests' files stay open from one sample to the next.

All guests together may keep two thirds of this program's descriptors. From these, PER_JOB for each
job is subtracted, and the descriptors that watch the servers of guests (server_exits.py). The other
third is for files that jobs and callers must have open. If jobs are added and room is short, the
next sample closes the files of the guests that have kept theirs longest. If there is no room for a
guest, its files are opened for each sample. It does not displace another guest: guests are sampled
in turn, so if each displaced the next, no file would be open when it is needed.
"""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from qkilld.evidence.kept_file import kept_files
from qkilld.evidence.server_exits import GuestServerExits

PER_JOB: Final = 4
"""Descriptors of a job: a pidfd, /proc/PID, the monitor, and an agent or a server."""
SPARE: Final = 64
"""A guest may begin to keep its files open only if there is room for this many. A guest has about
ten, so its files rarely displace those of other guests."""


class Keeper(Protocol):
    def stop_keeping(self) -> None:
        """Close the files, or let the sample that is being taken close them."""


class FileBudget:
    """Not thread-safe."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: how many descriptors this program may have; None for its RLIMIT_NOFILE."""
        if limit is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limit * 2 // 3
        self._keepers: OrderedDict[Keeper, None] = OrderedDict()
        """The guests that may keep files, the oldest first."""
        self.jobs: Callable[[], int] = lambda: 0
        """A function that returns the number of running jobs."""

    def admit(self, keeper: Keeper) -> bool:
        """Return whether this guest's files may stay open after the sample that is about to be
        taken."""
        room = self._most - PER_JOB * self.jobs() - GuestServerExits.descriptors
        while self._keepers and kept_files() > room:
            oldest, _ = self._keepers.popitem(last=False)
            oldest.stop_keeping()
        if keeper not in self._keepers:
            if kept_files() + SPARE > room:
                return False
            self._keepers[keeper] = None
        return True

    def forget(self, keeper: Keeper) -> None:
        """Forget a keeper that has closed its files for good. May be called again."""
        self._keepers.pop(keeper, None)
