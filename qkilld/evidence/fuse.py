"""Find the processes that serve FUSE file systems, and the requests that wait for them.

A FUSE file system has no counters, but its server may store the files on a disk of this host. While
QEMU waits for one answer, such as that to an fsync, only the server's disk shows progress.

Each mount has a connection, whose number is the minor number of the mount's st_dev. Since Linux
6.16 (measured on 6.18), fdinfo of the server's /dev/fuse names the connection. On older kernels,
every process that has /dev/fuse open may be the server, and any user can open it. There the server
is certain only if a single process has /dev/fuse open, and all processes could be read.

Sources: kernel fs/fuse/dev.c (fuse_dev_show_fdinfo), Documentation/filesystems/fuse.rst
("Control filesystem").
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.procfs import read_bounded
from qkilld.debug_log import note_once
from qkilld.evidence.kept_file import read_once
from qkilld.model.sample import Mount

DEVICE: Final = "/dev/fuse"
MAX_SERVERS: Final = 8
"""If more processes than this may serve one connection, only those are sampled that have a file
with the name of the guest's image open."""
AGE_S: Final = 30.0
"""How long a search through all processes is valid if the kernel does not name connections."""
RENEW_S: Final = 20.0
"""When to search again, so that the next search is complete before AGE_S."""

_LABEL: Final = b"\nfuse_connection:\t"
_UNNAMED: Final = None
"""The key of the processes whose connection the kernel does not name."""


class FuseServers(NamedTuple):
    pids: tuple[int, ...]
    """The processes that may serve a connection."""
    certain: bool
    """Whether all of them do."""


def connection_of(mount: Mount) -> int | None:
    """Return the number of the mount's FUSE connection; None for another file system."""
    major, _, minor = mount.number.partition(":")
    if mount.kind.partition(".")[0] != "fuse" or major != "0" or not int(minor or 0):
        return None
    return int(minor)


def read_waiting(connection: int, sys: Path = Path("/sys")) -> int | None:
    """Return the number of requests that the server has not answered; None if the control file
    system is not mounted."""
    text = read_bounded(f"{sys}/fs/fuse/connections/{connection}/waiting", 64)
    return int(text) if text is not None and text.strip().isdigit() else None


class FuseHolders:
    """The processes that have /dev/fuse open, as PeerFinder finds them. Thread-safe."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._descriptors: dict[int | None, dict[int, str]] = {}
        """The descriptor of each process, by connection."""
        self._is_named = False
        """Whether the kernel is known to name connections."""
        self._complete_at: float | None = None
        """When a search through all processes was last complete, time.monotonic()."""
        self._all_readable = False
        """Whether that search was permitted to read all of them."""

    def add(self, pid: int, descriptor: str) -> None:
        """Add a process that has /dev/fuse open."""
        connection = self._connection(pid, descriptor)
        with self._lock:
            self._is_named = self._is_named or connection is not _UNNAMED
            self._descriptors.setdefault(connection, {})[pid] = descriptor

    def complete(self, *, readable: bool) -> None:
        """Note that all processes were searched. `readable`: whether all could be read. A user's
        daemon lacks the ptrace right, and cannot read the processes of other users."""
        self._all_readable = readable
        self._complete_at = time.monotonic()

    def wants_search(self, connections: Iterable[int]) -> bool:
        """Return whether a search may find out more about these connections."""
        if self.names_all(connections):
            return False
        return not self._is_complete(RENEW_S) or not self._candidates()

    def names_all(self, connections: Iterable[int]) -> bool:
        """Return whether the kernel has named a server of each connection."""
        return all(self._living(number) for number in connections)

    def servers_of(self, connections: Iterable[int]) -> dict[int, FuseServers]:
        """Return the processes that serve each connection. Connections without a known process are
        left out."""
        named = {number: self._living(number) for number in connections}
        candidates = () if all(named.values()) else self._candidates()
        is_only = len(candidates) == 1 and self._all_readable and self._is_complete(AGE_S)
        return {
            number: FuseServers(pids, True) if pids else FuseServers(candidates, is_only)
            for number, pids in named.items()
            if pids or candidates
        }

    def _is_complete(self, age: float) -> bool:
        """Return whether all processes were searched at most this many seconds ago."""
        at = self._complete_at
        return at is not None and time.monotonic() - at <= age

    def _candidates(self) -> tuple[int, ...]:
        """Return the processes that may serve any connection. There are none if the kernel names
        connections: then a descriptor without a named connection has no mount."""
        return () if self._is_named else self._living(_UNNAMED)

    def _living(self, connection: int | None) -> tuple[int, ...]:
        """Return the processes that still have the connection open. Costs 3 to 15 µs each."""
        with self._lock:
            descriptors = self._descriptors.get(connection, {})
            for pid, descriptor in list(descriptors.items()):
                if not self._is_open(pid, descriptor, connection):
                    del descriptors[pid]
            if not descriptors:
                self._descriptors.pop(connection, None)
            return tuple(descriptors)

    def _is_open(self, pid: int, descriptor: str, connection: int | None) -> bool:
        try:
            link = os.readlink(f"{self._proc}/{pid}/fd/{descriptor}")  # noqa: PTH115
        except OSError:
            return False
        # The descriptor may have been closed, and opened for another mount.
        return link == DEVICE and (
            connection is _UNNAMED or connection == self._connection(pid, descriptor)
        )

    def _connection(self, pid: int, descriptor: str) -> int | None:
        try:
            text = read_once(f"{self._proc}/{pid}/fdinfo/{descriptor}")
        except OSError as error:
            note_once("reading fdinfo of a FUSE server", error)
            return _UNNAMED
        number = text.partition(_LABEL)[2].partition(b"\n")[0]
        return int(number) if number.isdigit() else _UNNAMED
