"""Search the descriptors of all processes for sockets or a device.

The kernel does not report which process has a socket or device open, so the descriptors of all
processes are searched, which takes 3 µs per descriptor. Any user can have millions of descriptors,
so the search is divided into parts, with pauses between them. Users take turns, and processes with
many descriptors are searched separately.

Needs the ptrace right for other users' processes. Source: proc_pid_fd(5).
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from qkilld.adapters import blockable
from qkilld.adapters.blockable import Unanswered
from qkilld.adapters.procfs import read_uid
from qkilld.debug_log import note_once
from qkilld.engine.fair_shares import user_of
from qkilld.evidence.files import MAX_DESCRIPTORS
from qkilld.model.named_tuple import NamedTuple

FEW: Final = 256
"""Processes with this many descriptors or more are searched separately."""
OF_A_PROGRAM: Final = 64
"""If a process of root has this many descriptors or more, its real user is looked up, because it
may be a set-user-ID program that another user has started."""
MAX_KEYS: Final = 65_536
"""The maximum number of keys to search for at a time. A key stands for a socket or device."""

_AT_ONCE: Final = 64
"""How many processes with few descriptors to read between two checks of the time."""


class DescriptorHolder(NamedTuple):
    pid: int
    descriptor: str


_Link = tuple[str, DescriptorHolder]


class _HeldLinks(NamedTuple):
    """The result of searching one process."""

    total: int
    """The number of the process's descriptors."""
    links: list[tuple[str, str]]
    """The links that were searched for, with the numbers of their descriptors."""
    seconds: float
    """The processor time of the search."""


class Candidate(NamedTuple):
    pid: int
    uid: int
    descriptor_count: int
    """The number of open descriptors; before Linux 6.2, the number at the last search, or 0."""


class CompletedSearch(NamedTuple):
    """A search through all processes. Times are of time.monotonic()."""

    began: float
    ended: float
    complete: bool
    """Whether all descriptors of all listed processes could be read."""


class DescriptorSearch:
    """Searches either all processes with few descriptors, or all with many. Not thread-safe."""

    def __init__(
        self, proc: Path, *, many: bool, pause_factor: float, valid_s: float, link: str = ""
    ) -> None:
        """`pause_factor`: the pause after a part of a search, as a multiple of the part's processor
        time. `valid_s`: how long (s) to remember that all processes were searched for a key.
        `link`: the link text of the wanted descriptors; "" if each key is itself a link text."""
        self._proc, self._many, self._link = proc, many, link
        self._pause_factor, self._valid_s = pause_factor, valid_s
        self._wanted: set[str] = set()
        """The keys to search for."""
        self._latecomers: set[str] = set()
        """Keys that were added after some processes had been searched."""
        self._searched: dict[str, CompletedSearch] = {}
        """The last search of all processes for each key."""
        self._rest: Iterator[_Link | None] | None = None
        """The rest of the present search through all processes; None between searches."""
        self._began = 0.0
        self._counts: dict[int, int] = {}
        self._without: set[Candidate] = set()
        """The processes that did not have `link` open when they were last searched."""
        self._is_complete = True
        """CompletedSearch.complete for the present search, so far."""
        self._is_blocked = False
        """Whether reading a process has timed out in the present search. A second attempt may
        succeed: a process blocks readers for a moment during execve(2)."""
        self._left_out: frozenset[int] = frozenset()
        """The processes that the present search leaves to `beside` because of their number of
        descriptors."""
        self.beside: DescriptorSearch | None = None
        """The search through the other processes. A process that `beside` has left out is searched
        here, even if its number of descriptors has changed since."""
        self._seconds = 0.0
        """The processor time of the threads that read the descriptors."""
        self._rests_until = 0.0

    def want(self, keys: Iterable[str]) -> None:
        for key in keys:
            if len(self._wanted) >= MAX_KEYS:
                return
            if key not in self._wanted:
                self._wanted.add(key)
                if self._rest is not None:
                    self._latecomers.add(key)

    @property
    def wants_any(self) -> bool:
        """Return whether there are keys to search for."""
        return bool(self._wanted)

    def forget(self, key: str) -> None:
        """Stop searching for a key, because it was found."""
        self._wanted.discard(key)

    def searched(self, key: str) -> CompletedSearch | None:
        """Return the last search through all processes for this key; None if there was none in the
        last `valid_s` seconds."""
        searched = self._searched.get(key)
        is_valid = searched is not None and time.monotonic() - searched.ended < self._valid_s
        return searched if is_valid else None

    def go_on(self, end: float) -> Iterator[_Link]:
        """Search until `end` (time.monotonic()), and yield each result. Does nothing during a
        pause."""
        now = time.monotonic()
        if now < self._rests_until or not self._wanted:
            return
        start, self._seconds = time.thread_time(), 0.0
        while self._wanted and time.monotonic() < end:
            if self._rest is None or self._wanted <= self._latecomers:
                # If only latecomers are still wanted, begin a new search, because some processes
                # were not searched for them.
                self._rest = self._search_all()
            try:
                link = next(self._rest)
            except StopIteration:
                self._finish()
            except Exception:
                # If this iterator were kept, the next call would treat the search as complete.
                self._rest = None
                raise
            else:
                if link is not None:
                    yield link
        took = time.thread_time() - start + self._seconds
        self._rests_until = time.monotonic() + self._pause_factor * took

    def _search_all(self) -> Iterator[_Link | None]:
        """Yield each result, and now and then None, so that the caller can check the time."""
        self._began = time.monotonic()
        self._is_complete, self._is_blocked = True, False
        self._latecomers.clear()
        processes = self._processes()
        self._counts = {process.pid: process.descriptor_count for process in processes}
        self._without &= set(processes)
        # Processes in `_without` may have opened `link` since, so they are searched again, but
        # last: most servers are new processes.
        new = [process for process in processes if process not in self._without]
        order = [*by_turns(new), *by_turns(self._without)]
        size = 1 if self._many else _AT_ONCE
        for first in range(0, len(order), size):
            part = order[first : first + size]
            directories = [f"{self._proc}/{process.pid}" for process in part]
            answers = blockable.shared.each(directories, self._read)
            for process, answer in zip(part, answers, strict=True):
                yield from self._links_of(process, answer)
            yield None

    def _finish(self) -> None:
        """End a search of all processes. Of the wanted keys, keep only those that were added during
        the search."""
        now = time.monotonic()
        self._rest = None
        self._searched = {
            key: searched
            for key, searched in self._searched.items()
            if now - searched.ended < self._valid_s
        }
        for key in self._wanted - self._latecomers:
            self._wanted.discard(key)
            if self._is_blocked and not self._link:
                continue
            if key in self._searched or len(self._searched) < MAX_KEYS:
                self._searched[key] = CompletedSearch(self._began, now, self._is_complete)

    def _processes(self) -> list[Candidate]:
        """List the processes. Costs 3 µs for each process."""
        processes = []
        left_out = []
        taken_over = self.beside._left_out if self.beside is not None else ()
        for name in os.listdir(self._proc):  # noqa: PTH208 - half the cost
            if not name.isdecimal():
                continue
            try:
                status = os.stat(f"{self._proc}/{name}/fd")  # noqa: PTH116 - half the cost
            except OSError as error:
                self._note_failure(error)
                continue
            count = status.st_size or self._counts.get(int(name), 0)
            if (count >= FEW) is not self._many and int(name) not in taken_over:
                left_out.append(int(name))
            elif count <= MAX_DESCRIPTORS:
                processes.append(self._of_its_user(Candidate(int(name), status.st_uid, count)))
            else:
                self._is_complete = False
        self._left_out = frozenset(left_out)
        return processes

    def _note_failure(self, error: Exception) -> None:
        """Note that the search is incomplete, unless the process has exited."""
        if not isinstance(error, (FileNotFoundError, ProcessLookupError)):
            self._is_complete = False

    def _of_its_user(self, process: Candidate) -> Candidate:
        """Return the process with its real user. For a set-user-ID program, /proc/PID belongs to
        root, whoever started the program."""
        if process.uid == 0 and process.descriptor_count >= OF_A_PROGRAM:
            try:
                return process._replace(uid=read_uid(process.pid, self._proc))
            except OSError as error:
                note_once("looking for servers", error)
        return process

    def _links_of(self, process: Candidate, answer: _HeldLinks | Exception) -> Iterator[_Link]:
        if isinstance(answer, Exception):
            self._note_failure(answer)
            self._is_blocked = self._is_blocked or isinstance(answer, Unanswered)
            note_once("looking for servers", answer)
            return
        self._seconds += answer.seconds
        self._counts[process.pid] = answer.total
        if answer.total > MAX_DESCRIPTORS:
            self._is_complete = False
        for link, name in answer.links:
            yield link, DescriptorHolder(process.pid, name)
        if self._link and not answer.links:
            self._without.add(process)

    def _read(self, directory: str) -> _HeldLinks:
        """Read the descriptors of a process. `directory`: /proc/PID. Raises OSError."""
        start = time.thread_time()
        with os.scandir(f"{directory}/fd") as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_DESCRIPTORS + 1)]
        links = []
        for name in names[:MAX_DESCRIPTORS]:
            try:
                link = os.readlink(f"{directory}/fd/{name}")  # noqa: PTH115 - half the cost
            except OSError:
                continue  # The descriptor was closed, or its link is too long.
            if link == self._link or (not self._link and link in self._wanted):
                links.append((link, name))
        return _HeldLinks(len(names), links, time.thread_time() - start)


def search_pair(
    proc: Path, *, pause_factor: float, valid_s: float, link: str = ""
) -> list[DescriptorSearch]:
    """Return two searches: through the processes with few descriptors, and through those with many.
    For the parameters see DescriptorSearch."""
    few, many = (
        DescriptorSearch(proc, many=many, pause_factor=pause_factor, valid_s=valid_s, link=link)
        for many in (False, True)
    )
    few.beside, many.beside = many, few
    return [few, many]


def by_turns(processes: Iterable[Candidate]) -> list[Candidate]:
    """Order processes so that, at any time, the search has read about equally many descriptors of
    each user. A user's processes with few descriptors come first."""
    searched_per_user: Counter[int] = Counter()
    order = []
    for process in sorted(
        processes, key=lambda process: (process.descriptor_count // FEW, process.pid)
    ):
        order.append((searched_per_user[user_of(process.uid)], process))
        searched_per_user[user_of(process.uid)] += process.descriptor_count + 1
    return [process for _, process in sorted(order)]
