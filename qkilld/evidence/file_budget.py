"""Decide for which guests this program keeps files open between samples.

The limit for the files of all guests is two thirds of this program's descriptors, minus PER_JOB for
each job, and minus the descriptors that watch the servers of guests (server_exits.py). The last
third is for files that jobs and callers must have open. If the limit falls because new jobs start,
the next sample closes the files that guests have kept open longest. If there is no room for a
guest's files, they are opened for each sample, and no other guest's files are closed for them.
Guests are sampled in turn: if each closed the files of the next, no file would be open when it is
needed.
"""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from qkilld.evidence.kept_file import kept_files
from qkilld.evidence.server_exits import GuestServerExits

PER_JOB: Final = 4
"""The descriptors that a job may have: a pidfd, /proc/PID, the monitor, and an agent or a
server."""
SPARE: Final = 64
"""A guest may begin to keep its files open only if there is room for this many files. A guest has
about ten, so guests rarely exceed the limit."""


class Keeper(Protocol):
    def stop_keeping(self) -> None:
        """Close the files, or let the sample that is being taken close them."""


class FileBudget:
    """Decides whether a guest's files may stay open. Not thread-safe."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: how many descriptors this program may have open; None for its RLIMIT_NOFILE."""
        if limit is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limit * 2 // 3
        self._keepers: OrderedDict[Keeper, None] = OrderedDict()
        """The guests that may keep files open. The guest that has kept them open longest comes
        first."""
        self.jobs: Callable[[], int] = lambda: 0
        """Returns the number of running jobs."""

    def admit(self, keeper: Keeper) -> bool:
        """Return whether this guest's files may stay open after its next sample."""
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
        """Forget a guest whose files will not be opened again. May be called twice."""
        self._keepers.pop(keeper, None)
