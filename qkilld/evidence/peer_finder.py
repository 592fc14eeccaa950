"""Find the process at the other end of a connection.

The kernel reports a socket's inode but not its process, so all processes are searched
(descriptor_search.py). A sample spends at most SEARCH_S on the search, and all searches together
use at most a fifth of a processor.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qkilld.adapters import blockable
from qkilld.adapters.blockable import Unanswered
from qkilld.evidence.descriptor_search import DescriptorHolder, search_pair
from qkilld.evidence.files import PROC

SEARCH_S: Final = 0.05
"""How long a sample may search, or wait for a search by another sample."""
BACKGROUND_SEARCH_S: Final = 1.0
"""How long a search between samples may take. No sample waits for it."""
PAUSE_FACTOR: Final = 9
"""The pause after a search, as a multiple of the search's processor time."""
RETRY_S: Final = 5.0
"""If no process of a socket was found, the search begins again after this time."""
MAX_PLACES: Final = 16_384
"""The maximum number of sockets whose process is cached. Each takes 200 bytes."""


class PeerFinder:
    """Finds the processes of sockets. Thread-safe."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._places: dict[str, DescriptorHolder] = {}
        """The process of each socket, keyed by the text of the descriptor's link."""
        self._lock = threading.Lock()
        """Held during a search."""
        self._searches = search_pair(proc, pause_factor=PAUSE_FACTOR, valid_s=RETRY_S)

    def find(self, inodes: Iterable[int]) -> dict[int, int]:
        """Return the process id of each socket whose process was found, keyed by the socket's
        inode. Takes at most about SEARCH_S, or twice as long if another thread is searching."""
        inode_set = set(inodes)
        owners = self._known(inode_set)
        missing = inode_set - owners.keys()
        if missing:
            self._search(missing, SEARCH_S, wait_s=SEARCH_S)
            owners |= self._known(missing)
        return owners

    def go_on(self, inodes: Iterable[int]) -> None:
        """Continue the search between samples, unless another thread is searching. Takes at most
        about BACKGROUND_SEARCH_S."""
        self._search(inodes, BACKGROUND_SEARCH_S)

    def searches(self, inodes: Iterable[int]) -> bool:
        """Return whether a search for one of these sockets has not ended yet."""
        links = list(map(_link, inodes))
        return any(search.searched(link) is None for link in links for search in self._searches)

    def _search(self, missing: Iterable[int], seconds: float, *, wait_s: float = 0.0) -> None:
        links = list(map(_link, missing))
        if not self._lock.acquire(timeout=wait_s):
            return
        try:
            end = time.monotonic() + seconds
            for search in self._searches:
                unknown = (link for link in links if link not in self._places)
                search.want(link for link in unknown if search.searched(link) is None)
                for link, place in search.go_on(end):
                    self._places.setdefault(link, place)
                    for other in self._searches:
                        other.forget(link)
            # Here no other thread adds a socket, which would break the iterator.
            while len(self._places) > MAX_PLACES:
                self._places.pop(next(iter(self._places)), None)
        finally:
            self._lock.release()

    def _known(self, inodes: Iterable[int]) -> dict[int, int]:
        """Return the cached processes that still have their socket, keyed by the socket's inode.
        Costs 50 µs, and 3 µs for each process."""
        places: dict[str, dict[int, str]] = {}
        for inode in inodes:
            if (place := self._places.get(_link(inode))) is not None:
                places.setdefault(f"{self._proc}/{place.pid}", {})[inode] = place.descriptor

        def read(directory: str) -> list[int]:
            return [
                inode
                for inode, descriptor in places[directory].items()
                if _read_link(f"{directory}/fd/{descriptor}") == _link(inode)
            ]

        owners: dict[int, int] = {}
        for directory, answer in zip(
            places, blockable.shared.each(list(places), read), strict=True
        ):
            if isinstance(answer, Unanswered):
                continue
            held = [] if isinstance(answer, Exception) else answer
            owners |= dict.fromkeys(held, int(directory.rpartition("/")[2]))
            for inode in places[directory].keys() - held:
                self._places.pop(_link(inode), None)
        return owners


def _read_link(path: str) -> str:
    """Return the link; "" if there is none."""
    try:
        return os.readlink(path)  # noqa: PTH115 - half the cost
    except OSError:
        return ""


def _link(inode: int) -> str:
    return f"socket:[{inode}]"
