"""Find out which servers ended before their guest. Implements engine.ports.ServerExits.

When a process ends, the kernel adds its pidfd to the ready list of an epoll. epoll_wait(2) returns
this list in order. So one call after the guest's end shows which servers ended before the guest,
however late the call is. Sources: pidfd_open(2), ep_poll_callback in fs/eventpoll.c.
"""

from __future__ import annotations

import os
import resource
import select
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from qkilld.adapters import procfs
from qkilld.debug_log import ignore, note_once
from qkilld.engine.fair_shares import user_of
from qkilld.evidence.kept_file import EXITED
from qkilld.evidence.sockdiag import closed_first

if TYPE_CHECKING:
    from qkilld.engine.ports import Process

MAX_SERVERS: Final = 64
"""At most this many servers are watched for one guest."""

_SLACK: Final = 20_000
"""The tolerance (µs) when start times are compared, because the kernel gives them in steps of 10
ms."""


_SHARE: Final = 4
"""At most 1/_SHARE of this program's descriptors are pidfds of servers. When this many are in use,
a guest takes one from the user whose guests have the most pidfds, unless the guest's own user has
about as many."""


class GuestServerExits:
    descriptors: ClassVar = 0
    """The number of open descriptors of all objects of this class."""
    _servers: ClassVar[Counter[int]] = Counter()
    """The number of watched servers for each user's guests."""
    _of_user: ClassVar[dict[int, dict[GuestServerExits, None]]] = {}
    """The objects with watched servers, keyed by the user of the guest."""

    def __init__(
        self, process: Process, started_at: Callable[[int], int], proc: Path = procfs.PROC
    ) -> None:
        """`process`: the guest. `started_at`: as in engine.ports.Clock. Raises OSError."""
        self._started_at, self._proc = started_at, proc
        self._user = user_of(process.guest.identity.uid)
        self._pidfds: dict[int, int] = {}
        """The pidfds of the watched servers, keyed by process id."""
        self._starts: dict[int, int] = {}
        """When the watched servers started (CLOCK_MONOTONIC, µs), keyed by process id."""
        self._gone: set[int] = set()
        """The servers that had ended before they could be watched."""
        self._unwatched: set[int] = set()
        self._guest = -1
        self._epoll = select.epoll()
        GuestServerExits.descriptors += 1
        try:
            fd = process.fileno()
            if fd is not None and fd >= 0:
                self._guest = os.dup(fd)
                GuestServerExits.descriptors += 1
                self._epoll.register(self._guest, select.EPOLLIN)
        except OSError:
            self.close()
            raise

    @property
    def unwatched(self) -> frozenset[int]:
        return frozenset(self._unwatched)

    def add(self, pid: int, seen_at: int) -> None:
        pidfd = self._pidfds.get(pid)
        if pidfd is not None and not _is_ready(pidfd):
            return
        self.remove(pid)
        if len(self._pidfds) >= MAX_SERVERS or not self._make_room():
            note_once("watching a server", "there are too many")
            self._unwatched.add(pid)
            return
        try:
            pidfd = os.pidfd_open(pid)
            self._keep(pid, pidfd)
            self._epoll.register(pidfd, select.EPOLLIN)
            started = self._started_at(procfs.read_stat(pid, self._proc).start_time)
        except OSError as error:
            note_once("watching a server", error)
            self.remove(pid)
            (self._gone if isinstance(error, EXITED) else self._unwatched).add(pid)
            return
        self._starts[pid] = started
        if started > seen_at + _SLACK:
            # The process id was reused, so the server has ended.
            self.remove(pid)
            self._gone.add(pid)

    def remove(self, pid: int) -> None:
        self._gone.discard(pid)
        self._unwatched.discard(pid)
        self._starts.pop(pid, None)
        if (pidfd := self._pidfds.pop(pid, None)) is not None:
            with ignore("no longer watching a server", OSError):
                self._epoll.unregister(pidfd)
            _close(pidfd)
            self._servers[self._user] -= 1
            if not self._pidfds:
                del self._of_user[self._user][self]
            if not self._servers[self._user]:
                del self._servers[self._user], self._of_user[self._user]

    def started(self, pid: int) -> int | None:
        return self._starts.get(pid)

    def has_ended(self, pid: int) -> bool:
        pidfd = self._pidfds.get(pid)
        return pid in self._gone or (pidfd is not None and _is_ready(pidfd))

    def ended(self) -> tuple[frozenset[int], frozenset[int]]:
        pids = {pidfd: pid for pid, pidfd in self._pidfds.items()}
        ready = [fd for fd, _ in self._epoll.poll(0, len(pids) + 1)]
        count = ready.index(self._guest) if self._guest in ready else len(ready)
        before = frozenset(pids[fd] for fd in ready[:count]) | self._gone
        after = {pids[fd] for fd in ready[count + 1 :]}
        after |= {pid for fd, pid in pids.items() if fd not in ready and self._is_ending(pid)}
        return before, frozenset(after) - before

    def closed_first(self, tcp_id: str) -> bool | None:
        return closed_first(bytes.fromhex(tcp_id)) if tcp_id else None

    def close(self) -> None:
        """May be called twice."""
        for pid in list(self._pidfds):
            self.remove(pid)
        if self._guest >= 0:
            _close(self._guest)
            self._guest = -1
        if not self._epoll.closed:
            self._epoll.close()
            GuestServerExits.descriptors -= 1

    def _keep(self, pid: int, pidfd: int) -> None:
        self._pidfds[pid] = pidfd
        GuestServerExits.descriptors += 1
        self._servers[self._user] += 1
        self._of_user.setdefault(self._user, {})[self] = None

    def _make_room(self) -> bool:
        """Return whether another server may be watched. If there is no room, stop watching one
        server of the user whose guests have the most watched servers, unless our guest's user has
        about as many. Servers of root's guests are never given up."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE
        if self._servers.total() < limit:
            return True
        users = [user for user in self._servers if user != 0]
        own = 0 if self._user == 0 else self._servers[self._user] + 1
        most = max(users, key=self._servers.__getitem__, default=0)
        if most == 0 or self._servers[most] <= own:
            return False
        other = next(reversed(self._of_user[most]))
        pid = next(reversed(other._pidfds))
        other.remove(pid)
        other._unwatched.add(pid)
        return True

    def _is_ending(self, pid: int) -> bool:
        try:
            return procfs.is_dying(pid, self._proc)
        except OSError as error:
            note_once("looking whether a server is ending", error)
            return True


def _is_ready(pidfd: int) -> bool:
    """Return whether the process has ended. This does not use the epoll, because epoll_wait(2)
    would change the order of its ready list."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _close(fd: int) -> None:
    os.close(fd)
    GuestServerExits.descriptors -= 1
