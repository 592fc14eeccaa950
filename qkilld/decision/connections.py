"""Distinguish progress on a connection from requests that are repeated again and again. Pure.

If a connection to a storage server breaks, QEMU connects again and repeats all requests that have
no reply yet. So a server that breaks each connection after some requests causes movement forever,
on its connections, in its calls, and perhaps on its disk. Only a reply proves progress, because
QEMU does not repeat a request that has a reply. The kernel counts the bytes of replies for TCP, but
not for unix sockets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass

BREAKS: Final = 3
"""After this many connections of a node have broken without a reply, movement on the next
connection may come from repeated requests alone."""
LASTS: Final = 6 * USEC_PER_SEC
"""If a connection has lasted this long (µs), and twice as long as any connection that broke without
a reply, movement on it counts as progress."""


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections of a node, tracked across samples. Times are CLOCK_MONOTONIC in µs."""

    inodes: frozenset[int] = frozenset()
    """The inodes of the connections in the last sample that had connections."""
    since: int = 0
    """When the connections in `inodes` were first seen."""
    seen_at: int = 0
    """When the connections in `inodes` were last seen."""
    broken: int = 0
    """How often connections were replaced by new ones since the last reply."""
    longest: int = 0
    """The longest time (µs) that a replacement connection lasted before it was replaced, too."""

    @property
    def repeats(self) -> bool:
        """Whether movement on these connections may come from repeated requests alone."""
        lasted = self.seen_at - self.since
        return self.broken >= BREAKS and (lasted < LASTS or lasted < 2 * self.longest)

    def follow(self, inodes: frozenset[int], at: int) -> Connections:
        """Return the connections after one more sample."""
        if not inodes:
            return self
        if self.inodes <= inodes:
            since = self.since if self.inodes else at
            return replace(self, inodes=inodes, since=since, seen_at=at)
        lasted = self.seen_at - self.since if self.broken else 0
        longest = max(self.longest, lasted)
        return Connections(inodes, at, at, self.broken + 1, longest)

    def answered(self) -> Connections:
        """Return the connections after a reply."""
        return replace(self, broken=0, longest=0)
