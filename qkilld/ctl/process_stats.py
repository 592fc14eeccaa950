"""A guest's resource usage, for display, from psutil.

No decision about signals uses psutil, because psutil reports on any process that has the pid now,
and trusts the command line if the executable is unreadable. Every call can raise: the process may
have ended, be a zombie, or belong to another user. A process can also block such calls, for example
with a command line that lies in a mapped FUSE file, so they are made in threads
(adapters.blockable). psutil is imported late, because its import takes 40 ms.
"""

from __future__ import annotations

import time
from typing import Any

from qkilld.adapters import blockable
from qkilld.debug_log import note
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.job_status import rounded
from qkilld.model.timespan import format_usec

_UNITS = "KMGTPE"


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """A value is None if it could not be read."""

    cpu: int | None = None
    """Processor time of all threads since the start, µs."""
    memory: int | None = None
    """Resident memory in bytes, including that of the guest."""
    uptime: int | None = None
    """Time since the start, µs."""

    def as_json(self) -> dict[str, int | None]:
        return {
            "cpu_usec": self.cpu,
            "memory_bytes": self.memory,
            "uptime_usec": self.uptime,
        }

    def cells(self) -> tuple[str, str, str]:
        """Format for display; "" for unreadable values."""
        return (
            "" if self.cpu is None else short_span(self.cpu),
            "" if self.memory is None else binary_size(self.memory),
            "" if self.uptime is None else short_span(self.uptime),
        )


def process_stats(pid: int, uid: int) -> ProcessStats:
    """Read the statistics of a process; empty if it is a zombie, belongs to another user, or blocks
    the reading."""
    import psutil

    def read(directory: str) -> ProcessStats:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.uids().real != uid or process.status() == psutil.STATUS_ZOMBIE:
                return ProcessStats()
            times = process.cpu_times()
            return ProcessStats(
                cpu=int((times.user + times.system) * USEC_PER_SEC),
                memory=process.memory_info().rss,
                uptime=max(0, int((time.time() - process.create_time()) * USEC_PER_SEC)),
            )

    try:
        return blockable.shared.one(f"/proc/{pid}", read)
    except (psutil.Error, OSError) as error:
        note(f"reading what process {pid} uses", error)
        return ProcessStats()


def executable(pid: int) -> str:
    """Return the path of a process's executable; "" if unreadable."""
    return str(_attribute(pid, "exe") or "")


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; empty if unreadable."""
    return list(_attribute(pid, "cmdline") or [])


def _attribute(pid: int, name: str) -> Any:
    import psutil

    try:
        return blockable.shared.one(
            f"/proc/{pid}", lambda _: psutil.Process(pid).as_dict([name])[name]
        )
    except (psutil.Error, OSError) as error:
        note(f"reading {name} of process {pid}", error)
        return None


def short_span(usec: int) -> str:
    """Format with at most two units, such as `2d 3h`, `1min 5s` or `12.34s`."""
    return " ".join(format_usec(rounded(usec)).split()[:2])


def binary_size(count: int) -> str:
    """Format like systemd, in powers of 1024, such as `512B` or `1.5G`."""
    if count < 1024:
        return f"{count}B"
    size = float(count)
    for unit in _UNITS:
        size /= 1024
        if size < 1000 or unit == _UNITS[-1]:
            break
    return f"{size:.1f}{unit}"
