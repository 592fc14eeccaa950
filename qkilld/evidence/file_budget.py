"""Decide which guests' files stay open from one sample to the next.

All guests together may keep files in two thirds of the descriptors that this program may have, less
PER_JOB for each job. The rest is for what jobs and callers cannot do without. When there are more
jobs, those guests' files are closed at once that were kept for the longest time. A guest without
room has its files opened for each sample. Guests are sampled in turns, so if a new one replaced
another each time, no file would be open when it is needed.
"""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from qkilld.evidence.kept_file import kept_files

PER_JOB: Final = 4
"""A pidfd, /proc/PID, the monitor, and an agent or a server."""
SPARE: Final = 64
"""A guest may keep files only if there is room for this many, so that usually none must be closed
for them; a guest has about ten."""


class Keeper(Protocol):
    def stop_keeping(self) -> None:
        """Close the files, or let the sample that is being taken close them."""


class FileBudget:
    """Use it in one thread."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` is that of this program's descriptors; None for its present RLIMIT_NOFILE."""
        if limit is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limit * 2 // 3
        self._keepers: OrderedDict[Keeper, None] = OrderedDict()
        """Those that may keep files, the oldest first."""
        self.jobs: Callable[[], int] = lambda: 0
        """Returns the number of running jobs."""

    def admit(self, keeper: Keeper) -> bool:
        """Return whether files stay open after the sample that is about to be taken."""
        room = self._most - PER_JOB * self.jobs()
        while self._keepers and kept_files() > room:
            oldest, _ = self._keepers.popitem(last=False)
            oldest.stop_keeping()
        if keeper not in self._keepers:
            if kept_files() + SPARE > room:
                return False
            self._keepers[keeper] = None
        return True

    def forget(self, keeper: Keeper) -> None:
        """It has no files any more. May be called again."""
        self._keepers.pop(keeper, None)
