"""Find the processes that have started a process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import PROC, read_stat
from qkilld.debug_log import note_once
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.sockdiag import SocketTable, Unreadable

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


def listener_of(pid: int, end: int, sockets: SocketTable, proc: Path = PROC) -> int:
    """If a process has an accepted connection, but does not listen at its address, return the
    nearest ancestor that does. It has most likely started the process for this connection. Return
    0 if there is no such ancestor, or if it is unknown.

    `end`: the inode of the process's end. A server that is being stopped closes its listening
    socket, too. So a service manager, which may keep a copy of it, does not count. Costs 4 µs for
    each descriptor of the process and its ancestors, and 10 µs for each of their sockets.
    """
    try:
        listens = _listens(end, sockets, proc)
        if listens is None or listens(pid) is not False:
            return 0
        return next((one for one in ancestors_of(pid, proc) if listens(one)), 0)
    except (OSError, Unreadable) as error:
        note_once("looking for the process that has started a server", error)
        return 0


def _listens(end: int, sockets: SocketTable, proc: Path) -> Callable[[int], bool | None] | None:
    """Return a function that tells whether a process listens at the address of a connection; None
    if it cannot tell. Return None if the address is unknown."""
    unix = sockets.unix(end)
    tcp = sockets.tcp(end) if unix is None else None
    name = b"" if unix is None else unix.name
    if not name and (tcp is None or not tcp.listened):
        return None

    def may_listen(pid: int, number: str, inode: int) -> bool:
        if name:
            return sockets.listens_at(inode) == name
        # The kernel does not show the port of a single listening TCP socket without a search.
        protocol = os.getxattr(f"{proc}/{pid}/fd/{number}", "system.sockprotoname")
        return protocol.startswith(b"TCP") and sockets.tcp(inode) is None

    def listens(pid: int) -> bool | None:
        descriptors = read_descriptors(pid, proc)
        if descriptors is None or descriptors.too_many:
            return None
        return any(may_listen(pid, number, inode) for number, inode in descriptors.sockets)

    return listens
