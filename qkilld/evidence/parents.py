"""Find the processes that have started a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import PROC, read_stat

_MAX_ANCESTORS: Final = 8
_MANAGER: Final = b"systemd"
"""The command of a user's service manager."""


def ancestors_of(pid: int, proc: Path = PROC) -> Iterator[int]:
    """Yield the parent of a process, the parent's parent, and so on, up to a service manager, which
    is not included. Raises OSError."""
    for _ in range(_MAX_ANCESTORS):
        pid = read_stat(pid, proc).parent
        if pid <= 1 or read_stat(pid, proc).comm == _MANAGER:
            return
        yield pid
