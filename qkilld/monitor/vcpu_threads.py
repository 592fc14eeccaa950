"""Read how busy the threads of a guest's virtual processors are.

Sources: proc(5), schedstat; Linux's Documentation/scheduler/sched-debug.rst and sched-pelt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from qkilld.monitor.starvation import times_of

FULL_LOAD: Final = 1024
"""The kernel's average (runnable_avg) for a thread that always wants a processor."""
_FAIR: Final = frozenset({0, 3, 5})
"""SCHED_NORMAL, SCHED_BATCH and SCHED_IDLE: the policies for which the kernel has an average."""
_POLICY: Final = re.compile(r"^policy\s*:\s*([0-9]{1,10})$", re.MULTILINE)
_RUNNABLE: Final = re.compile(r"^se\.avg\.runnable_avg\s*:\s*([0-9]{1,10})$", re.MULTILINE)


class VcpuThreads:
    def __init__(self, tasks: Path, threads: tuple[int, ...]) -> None:
        """`tasks` is /proc/PID/task."""
        self._tasks, self._threads = tasks, threads

    @property
    def count(self) -> int:
        return len(self._threads)

    def times(self) -> tuple[int | None, int | None]:
        """Return times_of() for all threads; (None, None) if any is unreadable."""
        return times_of(self._tasks, self._threads) or (None, None)

    def load(self) -> float | None:
        """Return how many processors of the host the threads have wanted lately.

        This is the sum of the kernel's averages for the threads. In an average, the load of 32 ms
        ago counts half. Time in which a thread waited for a processor is included. Return None if
        unreadable, or if a thread has a scheduling policy without such an average, for example a
        real-time policy.
        """
        load = 0
        for thread in self._threads:
            try:
                one = parse_load((self._tasks / f"{thread}/sched").read_text(errors="replace"))
            except OSError:
                return None
            if one is None:
                return None
            load += one
        return load / FULL_LOAD


def own_threads(tasks: Path, threads: tuple[int, ...]) -> VcpuThreads | None:
    """Return the threads; None if the process has no threads with these ids. In another PID
    namespace, QEMU reports other ids."""
    try:
        known = all((tasks / str(thread)).exists() for thread in threads)
    except OSError:
        return None
    return VcpuThreads(tasks, threads) if known else None


def parse_load(text: str) -> int | None:
    """Return runnable_avg of /proc/PID/task/TID/sched (Linux 5.7 and later); None if the thread has
    no such average.

    The first line contains the thread's name, which may be any text, so the last match is used.
    """
    policies, averages = _POLICY.findall(text), _RUNNABLE.findall(text)
    if not policies or not averages or int(policies[-1]) not in _FAIR:
        return None
    return int(averages[-1])
