"""Count the bytes that a process has written, to disks and through storage servers. Pure.

The process's own counters cover writes to its disks, and bytes that servers acknowledged over TCP.
A unix socket has no counter. Instead, the bytes that its server writes are counted, if the server
has no other client. Only some samples read the servers, so each reading of a server adds the bytes
that the server has written since its previous reading.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.decision.signs import waits_for_storage
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Sample, Socket

RATE_WINDOW: Final = 10 * USEC_PER_SEC
"""The rate is a mean over at most this time (µs). Disks write data back in bursts that are up to 5
s apart."""
MAX_SERVERS: Final = 256
"""At most this many servers are remembered, the last read ones. A sample reads at most 64, but a
server may be started again and again."""
_STEP: Final = 2 * USEC_PER_SEC
"""At most one total is kept for each interval of this length (µs)."""


@dataclass(frozen=True, slots=True)
class Point:
    """How many bytes were written up to a certain time."""

    at: int
    """CLOCK_MONOTONIC, µs."""
    total: int


@dataclass(frozen=True, slots=True)
class ServerCount:
    """How many bytes a server had written when its counters were last read."""

    pid: int
    written: int


@dataclass(frozen=True, slots=True)
class Amounts:
    """The written bytes so far, and their rate. Sizes are in bytes."""

    served: int = 0
    """How many bytes the servers behind unix sockets have written since their first sample."""
    servers: tuple[ServerCount, ...] = ()
    """The counts of the last MAX_SERVERS servers, the last read one at the end."""
    points: tuple[Point, ...] = ()
    """The totals at points in the last RATE_WINDOW, the oldest first."""
    rate: int | None = None
    """Bytes per second over RATE_WINDOW; None if unknown."""


NOTHING_COUNTED: Final = Amounts()


def count_amounts(before: Amounts, first: Sample, sample: Sample) -> Amounts:
    """Return the amounts after one more sample."""
    served, servers = before.served, before.servers
    if pairs := _served_bytes(sample):
        earlier = {server.pid: server.written for server in servers}
        for pid, written in pairs:
            served += max(0, written - earlier.pop(pid, written))
            earlier[pid] = written
        counts = [ServerCount(pid, written) for pid, written in earlier.items()]
        servers = tuple(counts[-MAX_SERVERS:])
    total = written_since(first, sample, served)
    if total is None:
        return Amounts(served, servers, before.points, None)
    points = [point for point in before.points if sample.at - point.at <= RATE_WINDOW]
    oldest = points[0] if points else None
    rate = None
    if oldest is not None and sample.at > oldest.at:
        rate = max(0, total - oldest.total) * USEC_PER_SEC // (sample.at - oldest.at)
    if not points or sample.at - points[-1].at >= _STEP:
        points.append(Point(sample.at, total))
    return Amounts(served, servers, tuple(points), rate)


def counts_of(first: Sample) -> Sample:
    """Remove large fields from the first sample: only its time and its counts of written bytes are
    used later."""
    return replace(first, threads=None, devices=None, mounts=None, host=None, rings=None)


def written_since(first: Sample, last: Sample, served: int) -> int | None:
    """Return the bytes written between two samples; None if no counter covers them."""
    before, after = _own_bytes(first), _own_bytes(last)
    if before is None or after is None:
        return None
    # `after` may be smaller, because it lacks the bytes of closed connections. If so, return only
    # `served`.
    return max(0, after - before) + served


def is_storage(socket: Socket) -> bool:
    """Return whether a server that stores data may be at the other end of the connection."""
    return socket.role == "storage" or (socket.role == "unknown" and not socket.accepted)


def _own_bytes(sample: Sample) -> int | None:
    """Return the bytes written to disks plus the bytes acknowledged over TCP. The bytes written to
    disks come from the guest's own control group, or else from /proc/PID/io; if they are unknown,
    return None."""
    group = sample.cgroup
    local = sample.io.write_bytes if sample.io is not None else None
    if group is not None and group.own and group.written is not None:
        local = group.written
    if local is None or not sample.sockets:
        return local
    return local + sum(
        socket.acked for socket in sample.sockets if is_storage(socket) and socket.acked is not None
    )


def _served_bytes(sample: Sample) -> list[tuple[int, int]]:
    """Return the pid and the written bytes of each server that works only for this process."""
    if not sample.sockets:
        return []
    peers = {
        socket.peer.pid: socket.peer
        for socket in sample.sockets
        if socket.peer is not None and socket.acked is None and is_storage(socket)
    }
    return [
        (pid, peer.io.write_bytes)
        for pid, peer in peers.items()
        if peer.io is not None and peer.shared is False
    ]


def pending(sample: Sample) -> int | None:
    """Return the bytes still to be written, from the most specific source available."""
    cgroup = sample.cgroup
    if cgroup is not None and cgroup.own and (remaining := _sum(cgroup.dirty, cgroup.writeback)):
        return remaining
    if queued := sum(s.send_queue for s in sample.sockets or () if is_storage(s)):
        return queued
    if sample.host is not None and any(waits_for_storage(t) for t in sample.threads or ()):
        return sample.host.dirty + sample.host.writeback
    return None


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
