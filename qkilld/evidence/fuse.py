"""Find the processes that serve FUSE file systems, and the requests that wait for them.

A FUSE file system has no counters, but its server may store the files on a disk of this host. While
QEMU waits for one reply, for example to an fsync, only the server's disk shows progress.

Each mount has a connection, whose number is the minor number of the mount's st_dev. Since Linux
6.16 (measured on 6.18), fdinfo of the server's /dev/fuse names the connection. On older kernels,
every process that has /dev/fuse open may be the server, and any user can open it. So the server is
certain only if a single process has /dev/fuse open, and all processes of the host were searched
after the mount was made. A process that was started after the mount cannot be the server. But if
another one that may have been the server has closed /dev/fuse, it may have passed its descriptor to
a newer process.

Sources: kernel fs/fuse/dev.c (fuse_dev_show_fdinfo), Documentation/filesystems/fuse.rst
("Control filesystem").
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from qkilld.adapters import blockable
from qkilld.adapters.blockable import Unanswered
from qkilld.adapters.procfs import read_bounded, read_stat
from qkilld.debug_log import note_once
from qkilld.evidence.descriptor_search import CompletedSearch, DescriptorHolder, search_pair
from qkilld.evidence.files import PROC
from qkilld.evidence.kept_file import read_once
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.sample import Mount

DEVICE: Final = "/dev/fuse"
MAX_SERVERS: Final = 8
"""If more processes than this may serve one connection, sample only those with an open file that is
named like a guest's image."""
SEARCH_S: Final = 0.02
"""How long a sample may search for servers. A sample does not wait for a search by another
thread."""
BACKGROUND_SEARCH_S: Final = 1.0
"""How long a search between samples may take. No sample waits for it."""
PAUSE_FACTOR: Final = 19
"""The pause after a search, as a multiple of the search's processor time. With this pause, the two
searches (search_pair) together use at most a tenth of a processor."""
RETRY_S: Final = 5.0
"""If no process was found that may serve a connection, the next search begins after this time."""
AGE_S: Final = 30.0
"""How long the result of a search through all processes is valid if the kernel does not name
connections."""
MAX_GONE: Final = 64
"""At most this many processes that have closed /dev/fuse are remembered."""
RENEW_S: Final = 20.0
"""Search again after this time, so that the next search ends before AGE_S has passed."""

FIRST_NAMESPACE: Final = "pid:[4026531836]"
_LABEL: Final = b"\nfuse_connection:\t"
_UNNAMED: Final = None
"""Stands for a connection that the kernel does not name."""


class _Holder(NamedTuple):
    """A process that has /dev/fuse open."""

    descriptor: str
    started: float
    """By time.monotonic(), or earlier; 0.0 if unknown."""


class FuseServers(NamedTuple):
    pids: tuple[int, ...]
    """The processes that may serve a connection."""
    certain: bool
    """Whether all processes in `pids` serve the connection."""


def connection_of(mount: Mount) -> int | None:
    """Return the number of the mount's FUSE connection; None for another file system."""
    major, _, minor = mount.number.partition(":")
    if mount.kind.partition(".")[0] != "fuse" or major != "0" or not int(minor or 0):
        return None
    return int(minor)


def read_waiting(connection: int, sys: Path = Path("/sys")) -> int | None:
    """Return the number of requests that the server has not answered; None if FUSE's control file
    system is not mounted."""
    text = read_bounded(f"{sys}/fs/fuse/connections/{connection}/waiting", 64)
    return int(text) if text is not None and text.strip().isdigit() else None


class FuseFinder:
    """Finds the servers of FUSE file systems, for all guests. Thread-safe.

    Its searches are separate from those of PeerFinder, so they do not delay the search for a
    socket.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._searching = threading.Lock()
        """Held during a search."""
        self._searches = search_pair(proc, pause_factor=PAUSE_FACTOR, valid_s=AGE_S, link=DEVICE)
        self._sees_all = _sees_all_processes(proc)
        self._lock = threading.Lock()
        """Protects `_holders` and `_gone`."""
        self._holders: dict[int | None, dict[int, _Holder]] = {}
        """The processes that have /dev/fuse open, keyed by connection."""
        self._gone: deque[tuple[float, float]] = deque(maxlen=MAX_GONE)
        """The processes without a named connection that have closed /dev/fuse: when each was
        started, and when we noticed its end (time.monotonic())."""
        self._is_named = False
        """Whether the kernel is known to name connections."""

    def find(self, connections: Mapping[int, float]) -> dict[int, FuseServers]:
        """Return the servers of FUSE connections. Connections without a known server are left out.
        Takes at most about SEARCH_S.

        `connections`: for each connection, when the caller first saw it (time.monotonic()). The
        kernel reuses the numbers of connections, so a search before that time proves nothing.
        """
        unnamed = self._search(connections, SEARCH_S)
        candidates = self._candidates() if unnamed else {}
        servers = {}
        for connection, since in connections.items():
            if named := self._living(connection):
                servers[connection] = FuseServers(tuple(named), True)
            elif candidates:
                gone_at = self._gone_at(since)
                pids = tuple(p for p, one in candidates.items() if gone_at or one.started < since)
                if pids:
                    is_searched = self._is_searched(connection, max(since, gone_at))
                    servers[connection] = FuseServers(pids, len(pids) == 1 and is_searched)
        return servers

    def go_on(self, connections: Mapping[int, float]) -> None:
        """Continue the search between samples. Takes at most about BACKGROUND_SEARCH_S."""
        self._search(connections, BACKGROUND_SEARCH_S)

    def searches(self, connections: Iterable[int]) -> bool:
        """Return whether a search for a server of one of these connections is unfinished."""
        unknown = [number for number in connections if not self._living(number)]
        return any(s.searched(str(number)) is None for number in unknown for s in self._searches)

    def _search(self, connections: Mapping[int, float], seconds: float) -> set[int]:
        """Search for servers, unless another thread is searching. Return the connections for which
        no server was known before the search."""
        unnamed = {number for number in connections if not self._living(number)}
        if not unnamed:
            return unnamed
        age = RENEW_S if self._candidates() else RETRY_S
        if not self._searching.acquire(blocking=False):
            return unnamed
        try:
            end = time.monotonic() + seconds
            for search in self._searches:
                search.want(
                    str(number)
                    for number in unnamed
                    if not _is_recent(search.searched(str(number)), connections[number], age)
                )
            for search in self._searches:
                for _, holder in search.go_on(end):
                    self._add(holder)
        finally:
            self._searching.release()
        return unnamed

    def _is_searched(self, connection: int, since: float) -> bool:
        """Return whether all processes were searched for the connection, both recently and after
        `since`."""
        searches = [search.searched(str(connection)) for search in self._searches]
        return self._sees_all and all(
            one is not None and one.complete and _is_recent(one, since, AGE_S) for one in searches
        )

    def _gone_at(self, since: float) -> float:
        """Return when a process that may have served a connection first seen at `since` was last
        found to have closed /dev/fuse; 0.0 if there was none."""
        with self._lock:
            return max((at for started, at in self._gone if started < since <= at), default=0.0)

    def _add(self, holder: DescriptorHolder) -> None:
        """Add a process that has /dev/fuse open."""
        try:
            connection = blockable.shared.one(
                f"{self._proc}/{holder.pid}",
                lambda directory: _connection(directory, holder.descriptor),
            )
        except OSError as error:
            note_once("reading fdinfo of a FUSE server", error)
            connection = _UNNAMED
        new = _Holder(holder.descriptor, _started(holder.pid, self._proc))
        with self._lock:
            self._holders.setdefault(connection, {})[holder.pid] = new
        if connection is not _UNNAMED:
            self._is_named = True
            for search in self._searches:
                search.forget(str(connection))

    def _candidates(self) -> dict[int, _Holder]:
        """Return the processes whose connection the kernel does not name: each of them may serve
        any connection. On a kernel that names connections, return none of them, because a
        descriptor without a named connection has no mount."""
        return {} if self._is_named else self._living(_UNNAMED)

    def _living(self, connection: int | None) -> dict[int, _Holder]:
        """Return the known processes that still have the connection open. Costs 50 µs, and 3 to 15
        µs for each process."""
        with self._lock:
            known = dict(self._holders.get(connection, {}))
        descriptors = {f"{self._proc}/{pid}": one.descriptor for pid, one in known.items()}

        def is_open(directory: str) -> bool:
            descriptor = descriptors[directory]
            link = os.readlink(f"{directory}/fd/{descriptor}")  # noqa: PTH115
            # The descriptor may have been closed and reused for another mount.
            return link == DEVICE and (
                connection is _UNNAMED or connection == _connection(directory, descriptor)
            )

        answers = blockable.shared.each(list(descriptors), is_open)
        living = {}
        for pid, answer in zip(known, answers, strict=True):
            if answer is True:
                living[pid] = known[pid]
            elif not isinstance(answer, Unanswered):
                self._remove(connection, pid, known[pid])
        return living

    def _remove(self, connection: int | None, pid: int, holder: _Holder) -> None:
        with self._lock:
            known = self._holders.get(connection, {})
            if known.get(pid) == holder:
                del known[pid]
                if connection is _UNNAMED:
                    self._gone.append((holder.started, time.monotonic()))
            if not known:
                self._holders.pop(connection, None)


def _started(pid: int, proc: Path) -> float:
    """Return when a process started, by time.monotonic(). Return an earlier time if the host was
    suspended since then, and 0.0 if the start is unknown."""
    try:
        ticks = read_stat(pid, proc).start_time
    except OSError as error:
        note_once("reading when a FUSE server started", error)
        return 0.0
    now = time.monotonic()  # Read this clock first: if we are interrupted, the result is earlier.
    # CLOCK_BOOTTIME includes the time in which the host was suspended, as `ticks` does.
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _connection(directory: str, descriptor: str) -> int | None:
    """Return the connection that a process has open. `directory`: /proc/PID. Raises OSError."""
    number = read_once(f"{directory}/fdinfo/{descriptor}").partition(_LABEL)[2].partition(b"\n")[0]
    return int(number) if number.isdigit() else _UNNAMED


def _sees_all_processes(proc: Path) -> bool:
    """Return whether we see the processes of all users and containers. This needs root, because
    hidepid= hides no process from root. It also needs the first PID namespace, whose number is
    PROC_PID_INIT_INO (include/linux/proc_ns.h)."""
    try:
        return os.geteuid() == 0 and os.readlink(f"{proc}/self/ns/pid") == FIRST_NAMESPACE  # noqa: PTH115
    except OSError as error:
        note_once("reading our PID namespace", error)
        return False


def _is_recent(searched: CompletedSearch | None, since: float, age: float) -> bool:
    """Return whether a search began after `since`, and ended at most `age` seconds ago."""
    return (
        searched is not None
        and searched.began >= since
        and time.monotonic() - searched.ended <= age
    )
