"""Tell progress on a connection from the same bytes sent again and again. Pure.

If a connection to a storage server breaks, QEMU connects again and repeats all requests that were
not answered. So a server that breaks each connection after some requests causes movement forever,
on its connections, in its calls, and perhaps on its disk. Only a reply proves progress, because a
request that has its reply is not repeated. TCP counts the bytes of replies; a unix socket does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass

BREAKS: Final = 3
"""After this many connections of a node have broken without a reply, movement on the next one may
be a repetition."""
LASTS: Final = 6 * USEC_PER_SEC
"""A connection counts as stable, so that movement on it is no repetition, if it has lasted this
long (µs), and twice as long as those that broke."""


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections of a node, followed from sample to sample. Times are CLOCK_MONOTONIC in
    µs."""

    inodes: frozenset[int] = frozenset()
    """The connections that were seen last."""
    since: int = 0
    """When these were first seen."""
    seen_at: int = 0
    """When these were last seen."""
    broken: int = 0
    """How often the connections were replaced since a reply was last seen."""
    longest: int = 0
    """The longest time (µs) that one of these replacements has lasted."""

    @property
    def repeats(self) -> bool:
        """Whether movement on these connections may only repeat that on earlier ones."""
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
