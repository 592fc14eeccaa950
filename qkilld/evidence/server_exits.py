"""Find out which servers ended before their guest did. Implements engine.ports.ServerExits.

The kernel puts a pidfd into the ready list of an epoll when its process ends, and epoll_wait(2)
returns that list in order. So one call after the guest's end shows which of the others ended before
it, however late the call is. Sources: pidfd_open(2), ep_poll_callback in fs/eventpoll.c.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.debug_log import note_once
from qkilld.engine.ports import Process
from qkilld.evidence.sockdiag import closed_first

_SLACK: Final = 20_000
"""Start times are known to 10 ms; twice that (µs)."""


class GuestServerExits:
    def __init__(
        self, process: Process, started_at: Callable[[int], int], proc: Path = procfs.PROC
    ) -> None:
        """`process`: the guest. `started_at`: as in engine.ports.Clock."""
        self._started_at, self._proc = started_at, proc
        self._epoll = select.epoll()
        self._pids: dict[int, int] = {}
        """The process ids of the servers by pidfd."""
        self._gone: set[int] = set()
        """Servers that had ended before they were watched, or cannot be watched."""
        fd = process.fileno()
        self._guest = os.dup(fd) if fd is not None and fd >= 0 else -1
        if self._guest >= 0:
            self._epoll.register(self._guest, select.EPOLLIN)

    def add(self, pid: int, seen_at: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            note_once("watching a server", error)
            self._gone.add(pid)
            return
        self._pids[pidfd] = pid
        self._epoll.register(pidfd, select.EPOLLIN)
        try:
            start_time = procfs.read_stat(pid, self._proc).start_time
            is_other = self._started_at(start_time) > seen_at + _SLACK
        except OSError as error:
            note_once("watching a server", error)
            is_other = True
        if is_other:  # The process id was reused, so the server has ended.
            self._gone.add(pid)

    def ended(self) -> tuple[frozenset[int], frozenset[int]]:
        ready = [fd for fd, _ in self._epoll.poll(0, len(self._pids) + 1)]
        count = ready.index(self._guest) if self._guest in ready else len(ready)
        before = frozenset(self._pids[fd] for fd in ready[:count]) | self._gone
        after = {self._pids[fd] for fd in ready[count + 1 :]}
        after |= {pid for fd, pid in self._pids.items() if fd not in ready and self._is_ending(pid)}
        return before, frozenset(after) - before

    def closed_first(self, tcp_id: str) -> bool | None:
        return closed_first(bytes.fromhex(tcp_id)) if tcp_id else None

    def close(self) -> None:
        self._epoll.close()
        for fd in (*self._pids, *([self._guest] if self._guest >= 0 else [])):
            os.close(fd)
        self._pids.clear()
        self._guest = -1

    def _is_ending(self, pid: int) -> bool:
        try:
            return procfs.is_dying(pid, self._proc)
        except OSError as error:
            note_once("looking whether a server is ending", error)
            return True
