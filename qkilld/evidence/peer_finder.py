"""Find the process at the other end of a connection, and the processes that serve FUSE.

The kernel reports a socket's inode but not its process. To find the process, the descriptors of all
processes are searched, at 3 µs each, and any user can have millions. So the search is limited: a
sample spends at most SEARCH_S on it, and all searches together use at most a fifth of a processor.
Users take turns, and processes with many descriptors are searched separately.

The same search finds the processes that have /dev/fuse open (fuse.py).

Needs the ptrace right for other users' processes. Source: proc_pid_fd(5).
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.procfs import read_uid
from qkilld.debug_log import note_once
from qkilld.evidence.files import MAX_DESCRIPTORS, PROC
from qkilld.evidence.fuse import DEVICE, FuseHolders, FuseServers

SEARCH_S: Final = 0.05
"""The longest time that a sample searches, or waits for a search by another sample."""
BACKGROUND_SEARCH_S: Final = 1.0
"""The longest time of a search between samples, for which no sample waits."""
PAUSE_FACTOR: Final = 9
"""After a search, pause for this many times its processor time."""
RETRY_S: Final = 5.0
"""How long to wait before searching again for a socket that was found in no process."""
FEW: Final = 256
"""Processes with this many descriptors or more are searched separately."""
OF_A_PROGRAM: Final = 64
"""For a process of root with this many descriptors or more, the real user is looked up, because
another user may have started it as a set-user-ID program."""
MAX_LINKS: Final = 65_536
"""The maximum number of sockets to search for at a time."""
MAX_PLACES: Final = 16_384
"""The maximum number of sockets whose process is cached, 200 bytes each."""


class _DescriptorHolder(NamedTuple):
    pid: int
    descriptor: str


class _Candidate(NamedTuple):
    pid: int
    uid: int
    descriptor_count: int
    """The number of open descriptors; before Linux 6.2, the number at the last search, or 0."""


class PeerFinder:
    """Finds the processes of sockets. Thread-safe."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        """Protects the searches."""
        self._places: dict[str, _DescriptorHolder] = {}
        """The processes of sockets, by the text of the descriptor's link."""
        self._searches = (_Search(proc, many=False), _Search(proc, many=True))
        self._fuse = FuseHolders(proc)

    def find(self, inodes: Iterable[int]) -> dict[int, int]:
        """Return the process id of each socket that was found, by inode. Takes at most about
        SEARCH_S, or twice that if another thread is searching."""
        inode_set = set(inodes)
        owners = self._known(inode_set)
        missing = inode_set - owners.keys()
        if missing and self._lock.acquire(timeout=SEARCH_S):
            try:
                self._search(map(_link, missing), SEARCH_S)
            finally:
                self._lock.release()
            owners |= self._known(missing)
        return owners

    def find_fuse(self, connections: Iterable[int]) -> dict[int, FuseServers]:
        """Return the servers of FUSE connections; those without a known process are left out.
        Takes at most as long as find()."""
        wanted = set(connections)
        if self._fuse.wants_search(wanted) and self._lock.acquire(timeout=SEARCH_S):
            try:
                self._search_fuse(wanted, SEARCH_S)
            finally:
                self._lock.release()
        return self._fuse.servers_of(wanted)

    def go_on_fuse(self, connections: Iterable[int]) -> None:
        """Continue the search for FUSE servers between samples, as go_on() does."""
        wanted = set(connections)
        if self._fuse.wants_search(wanted) and self._lock.acquire(blocking=False):
            try:
                self._search_fuse(wanted, BACKGROUND_SEARCH_S)
            finally:
                self._lock.release()

    def _search_fuse(self, connections: Iterable[int], seconds: float) -> None:
        self._search([DEVICE], seconds)
        if self._fuse.names_all(connections):
            # Stop here: searching the remaining processes would delay the searches for other
            # guests' servers.
            for search in self._searches:
                search.forget(DEVICE)
        elif not any(search.wants(DEVICE) for search in self._searches):
            self._fuse.complete(readable=all(search.all_readable for search in self._searches))

    def go_on(self, inodes: Iterable[int]) -> None:
        """Continue the search between samples, unless another thread is searching. Takes at most
        about BACKGROUND_SEARCH_S."""
        if self._lock.acquire(blocking=False):
            try:
                self._search(map(_link, inodes), BACKGROUND_SEARCH_S)
            finally:
                self._lock.release()

    def _search(self, missing: Iterable[str], seconds: float) -> None:
        end = time.monotonic() + seconds
        links = list(missing)
        for search in self._searches:
            search.want(link for link in links if link not in self._places)
            for link, place in search.go_on(end):
                if link == DEVICE:
                    # Many processes may have it open.
                    self._fuse.add(place.pid, place.descriptor)
                    continue
                self._places.setdefault(link, place)
                for other in self._searches:
                    other.forget(link)
        while len(self._places) > MAX_PLACES:
            del self._places[next(iter(self._places))]

    def _known(self, inodes: Iterable[int]) -> dict[int, int]:
        """Return cached processes that still have their socket. Costs 3 µs each."""
        owners = {}
        for inode in inodes:
            wanted = _link(inode)
            place = self._places.get(wanted)
            if place is None:
                continue
            try:
                link = os.readlink(f"{self._proc}/{place.pid}/fd/{place.descriptor}")  # noqa: PTH115
            except OSError:
                link = ""
            if link == wanted:
                owners[inode] = place.pid
            else:
                self._places.pop(wanted, None)
        return owners


class _Search:
    """Searches either all processes with few descriptors, or all with many."""

    def __init__(self, proc: Path, *, many: bool) -> None:
        self._proc, self._many = proc, many
        self._wanted: set[str] = set()
        """The texts of the links of descriptors to search for."""
        self._latecomers: set[str] = set()
        """Links that were added after some processes had been searched."""
        self._retry_at: dict[str, float] = {}
        """When to search again for links that were searched for in all processes,
        time.monotonic()."""
        self._candidates: Iterator[_Candidate] | None = None
        """The processes still to be searched; None between searches."""
        self._counts: dict[int, int] = {}
        self._is_denied = False
        """Whether the present search was not permitted to read a process."""
        self.all_readable = False
        """Whether the last search was permitted to read all processes."""
        self._rests_until = 0.0

    def want(self, links: Iterable[str]) -> None:
        now = time.monotonic()
        for link in links:
            if len(self._wanted) >= MAX_LINKS and link != DEVICE:
                continue
            if link not in self._wanted and now >= self._retry_at.get(link, 0.0):
                self._wanted.add(link)
                if self._candidates is not None:
                    self._latecomers.add(link)

    def wants(self, link: str) -> bool:
        """Return whether some processes have yet to be searched for the link."""
        return link in self._wanted

    def forget(self, link: str) -> None:
        """Stop searching for a link, because what was wanted is found."""
        self._wanted.discard(link)

    def go_on(self, end: float) -> Iterator[tuple[str, _DescriptorHolder]]:
        """Yield links found until `end`, time.monotonic(). Finds nothing during a pause."""
        now = time.monotonic()
        if now < self._rests_until or not self._wanted:
            return
        start = time.thread_time()
        while self._wanted and time.monotonic() < end:
            if self._candidates is None:
                self._is_denied = False
                self._candidates = iter(self._processes())
            process = next(self._candidates, None)
            if process is None:
                self._finish()
            else:
                yield from self._links_of(process.pid)
        self._rests_until = time.monotonic() + PAUSE_FACTOR * (time.thread_time() - start)

    def _finish(self) -> None:
        """End a search of all processes. Continue only with links that were added meanwhile."""
        now = time.monotonic()
        self._candidates = None
        self.all_readable = not self._is_denied
        self._retry_at = {link: at for link, at in self._retry_at.items() if at > now}
        for link in self._wanted - self._latecomers:
            self._wanted.discard(link)
            if len(self._retry_at) < MAX_LINKS:
                self._retry_at[link] = now + RETRY_S
        self._latecomers.clear()

    def _processes(self) -> list[_Candidate]:
        """List processes in the order of the search. Costs 3 µs each."""
        pids = []
        for name in os.listdir(self._proc):  # noqa: PTH208 - half the cost
            if not name.isdecimal():
                continue
            try:
                status = os.stat(f"{self._proc}/{name}/fd")  # noqa: PTH116 - half the cost
            except OSError as error:  # It has exited, or hidepid= hides its files.
                self._is_denied = self._is_denied or isinstance(error, PermissionError)
                continue
            count = status.st_size or self._counts.get(int(name), 0)
            if (count >= FEW) is self._many and count <= MAX_DESCRIPTORS:
                pids.append(self._of_its_user(_Candidate(int(name), status.st_uid, count)))
        self._counts = {process.pid: process.descriptor_count for process in pids}
        return by_turns(pids)

    def _of_its_user(self, process: _Candidate) -> _Candidate:
        """Return the process with its real user, which /proc/PID does not show for a set-user-ID
        program: root owns its directory, whoever started it."""
        if process.uid == 0 and process.descriptor_count >= OF_A_PROGRAM:
            try:
                return process._replace(uid=read_uid(process.pid, self._proc))
            except OSError as error:
                note_once("looking for servers", error)
        return process

    def _links_of(self, pid: int) -> Iterator[tuple[str, _DescriptorHolder]]:
        try:
            directory = os.open(f"{self._proc}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._is_denied = self._is_denied or isinstance(error, PermissionError)
            note_once("looking for servers", error)
            return
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in itertools.islice(entries, MAX_DESCRIPTORS + 1)]
            self._counts[pid] = len(names)
            for name in names[:MAX_DESCRIPTORS]:
                try:
                    link = os.readlink(name, dir_fd=directory)
                except OSError:
                    continue  # Closed meanwhile, or its name is too long.
                if link in self._wanted:
                    yield link, _DescriptorHolder(pid, name)
        except OSError as error:
            note_once("looking for servers", error)
        finally:
            os.close(directory)


def by_turns(processes: Iterable[_Candidate]) -> list[_Candidate]:
    """Order processes so that the search looks at equally many descriptors of each user. A user's
    processes with few descriptors come first."""
    searched_per_uid: Counter[int] = Counter()
    order = []
    for process in sorted(
        processes, key=lambda process: (process.descriptor_count // FEW, process.pid)
    ):
        order.append((searched_per_uid[process.uid], process))
        searched_per_uid[process.uid] += process.descriptor_count + 1
    return [process for _, process in sorted(order)]


def _link(inode: int) -> str:
    return f"socket:[{inode}]"
