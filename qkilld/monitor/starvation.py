"""Find out whether a process spends more time waiting for the host's processors than running.

Source: proc(5), schedstat. The time that CPUQuota= withholds counts as waiting.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.model.constants import USEC_PER_SEC

MAX_THREADS: Final = 64
"""At most this many threads are read, which takes 15 µs for each. A process may have thousands of
threads."""


class Starvation:
    def __init__(self, tasks: Path) -> None:
        """`tasks` is /proc/PID/task."""
        self._tasks = tasks
        self._at, self._times = time.monotonic(), times_of(tasks, self._threads())

    def is_starved(self) -> bool:
        """Return whether the process waited for longer than it ran since the last call (at the
        first call, since this object was created). False if unknown."""
        at, before, threads = self._at, self._times, self._threads()
        self._at, self._times = time.monotonic(), times_of(self._tasks, threads)
        if before is None or self._times is None:
            return False
        ran, waited = self._times[0] - before[0], self._times[1] - before[1]
        if waited > max(ran, 0):
            return True
        # The kernel counts a wait only when it ends, so look for a thread that still waits.
        return ran < (self._at - at) / 2 * USEC_PER_SEC and any(map(self._is_runnable, threads))

    def _threads(self) -> list[str]:
        """List the threads; none if they are unreadable."""
        try:
            with os.scandir(self._tasks) as entries:
                return [entry.name for entry in itertools.islice(entries, MAX_THREADS)]
        except OSError:
            return []

    def _is_runnable(self, thread: str) -> bool:
        try:
            return procfs.read_stat(int(thread), self._tasks).state == "R"
        except OSError:
            return False


def times_of(tasks: Path, threads: Iterable[int | str]) -> tuple[int, int] | None:
    """Return two sums over these threads, in µs: how long they ran, and how long they waited for a
    processor of the host. Return None if any thread is unreadable, or if there is no thread.

    The second sum includes the time that CPUQuota= withheld (cpu.max; measured, Linux 6.18). If a
    hypervisor withholds time from the host, and reports this to the host, neither sum includes it.
    """
    ran = waited = 0
    for thread in threads:
        try:
            fields = (tasks / f"{thread}/schedstat").read_bytes().split()
            own = int(fields[0]), int(fields[1])
        except (OSError, ValueError, IndexError):
            return None
        if own == (0, 0):  # The kernel does not count these times (sched_info_on()).
            return None
        ran, waited = ran + own[0], waited + own[1]
    return (ran // 1000, waited // 1000) if ran or waited else None
