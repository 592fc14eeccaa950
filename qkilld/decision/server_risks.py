"""Find out whether a server of a guest's network disks may have ended before the guest. Pure.

If a server ends before the guest has closed its disk, QEMU's last writes and flushes fail. QEMU
then exits at once, with code 0. After the guest's end, qkilld checks which process ended first.

A server that is being stopped closes its connections some time before it ends. So a server that
ends soon after the guest (SETTLE) is a risk, too. For TCP, the kernel may show that the guest
closed the connection first. If the server is on another host, this is the only evidence.

A server may also hold data that it has acknowledged, but not flushed. If it ends during the stop,
and QEMU reconnects to a new server, the old data is lost. This is a risk even if QEMU can reconnect
(reconnect-delay), because QEMU keeps only its unanswered requests. How the server ended is unknown,
so a clean end is a risk, too. If no earlier server is known, a server that has started after the
job proves that another one ended, because the node had its data before.

If it is uncertain which process serves a FUSE file system, the end of each process that may be
counts as a risk. A flush that succeeds later proves nothing: if a FUSE server does not implement
fsync, the kernel answers fsync itself, even after the server's end (fuse_fsync in fs/fuse/file.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Final

from qkilld.decision.node_groups import title_of
from qkilld.decision.servers import MountServers, NodeServer, StorageServers
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.job import Risk
from qkilld.model.sample import Node, Sample

SETTLE: Final = USEC_PER_SEC * 3 // 10
"""If a server still runs this long (µs) after the guest's end, it was not being stopped when the
guest ended. An idle QEMU or qemu-nbd exits a few ms after it has closed its connections."""
_MAY_BE_LOST: Final = "data that it had acknowledged may be lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEnds:
    """What happened to the servers around the end of the guest. Times are CLOCK_MONOTONIC in µs."""

    before: frozenset[int] = frozenset()
    """The processes that ended, or may have ended, before the guest."""
    after: frozenset[int] = frozenset()
    """The processes that ended within SETTLE after the guest, or are ending."""
    stopping: frozenset[int] = frozenset()
    """The processes that qkilld is stopping."""
    young: frozenset[int] = frozenset()
    """The processes that started after the job."""
    closed_first: Mapping[str, bool] = field(default_factory=dict)
    """Keyed by a node's name: whether the guest closed the connection before the server did. A node
    is missing if this is unknown, or if the node is not NBD over TCP (is_nbd_over_tcp).

    For a server on this host, False proves nothing: after QEMU's request to disconnect, a healthy
    server may close the connection before QEMU calls shutdown(2). With a load of 3 on two
    processors, a server on this host closed first in 38 of 120 stops. With a load of 15, a server
    across a network without latency closed first in 1 of 60 stops.
    """
    guest_started: int
    guest_ended: int


def needs_settling(servers: StorageServers | None, closed_first: Mapping[str, bool]) -> bool:
    """Return True if only a wait of SETTLE µs can show whether a server was being stopped when the
    guest ended. `closed_first`: see ServerEnds."""
    if servers is None:
        return False
    known = servers.connected
    return bool(servers.left or servers.mounts) or any(
        one.lasting and not one.outlived(closed_first.get(name)) for name, one in known.items()
    )


def risks_of_servers(servers: StorageServers | None, ends: ServerEnds) -> tuple[Risk, ...]:
    """Return the risks after QEMU has exited; () if nothing indicates that a server ended first.

    If a node has only lost its connection, and its reconnect-delay has not passed, this is no risk:
    QEMU would have kept the data and not exited (risk.py).
    """
    if servers is None:
        text = "its connections to the servers of its disks could not be read"
        return (Risk("unknown", text),)
    texts = []
    for node in servers.disconnected:
        nodes = servers.alike(node)
        if not _was_kept(nodes, ends.guest_started, ends.guest_ended):
            texts.append(f"{title_of(nodes)} had no connection to its server")
    for name, server in servers.connected.items():
        nodes = servers.alike(server.node)
        was_kept = _was_kept(nodes, server.at, ends.guest_ended)
        problem = _data_problem(server, ends, ends.closed_first.get(name))
        if not (problem or was_kept):
            problem = _connection_problem(server, ends, ends.closed_first.get(name))
        if problem:
            texts.append(f"{title_of(nodes)}: {problem}")
    for mount in servers.mounts.values():
        if problem := _end_problem(mount, ends) or _late_end_problem(mount, ends):
            texts.append(f"{mount.title}: {problem}")
    # A server that was left may have been killed before, even if it ends only now.
    ended = ends.before | ends.after | ends.stopping
    texts += _losses(servers, ends.young, ended)
    return tuple(Risk("unknown", text) for text in dict.fromkeys(texts))


def risks_so_far(
    servers: StorageServers, young: frozenset[int], ended: frozenset[int], sample: Sample | None
) -> tuple[Risk, ...]:
    """Return the risks of the servers that certainly `ended` before the guest closed its disks.
    QEMU may still run. `young`: as in ServerEnds.

    `sample`: the newest sample; None if the guest had closed nothing when the servers ended. A
    sample may be older than that. So leave out a server if QEMU had perhaps closed its connection
    first, or if the kernel may later prove that it did.
    """
    shown = None if sample is None else {socket.inode for socket in sample.sockets or ()}
    ends = ServerEnds(before=ended, guest_started=0, guest_ended=0)
    texts = []
    for server in servers.connected.values():
        is_open = shown is None or (server.inode in shown and not server.outlived(True))
        if is_open and (problem := _end_problem(server, ends)):
            texts.append(f"{title_of(servers.alike(server.node))}: {problem}")
    for mount in servers.mounts.values():
        if problem := _end_problem(mount, ends):
            texts.append(f"{mount.title}: {problem}")
    texts += _losses(servers, young, ended)
    return tuple(Risk("unknown", text) for text in dict.fromkeys(texts))


def _losses(servers: StorageServers, young: frozenset[int], ended: frozenset[int]) -> Iterator[str]:
    """Yield at most one text for each node and mount of which a server was replaced."""
    lost = {
        place: f"{text} during the stop; if its server ended,"
        for place, text in servers.lost.items()
    }
    for pid, left in servers.left.items():
        if pid in ended:
            lost.setdefault(left.place, f"{left.text} during the stop;")
    yield from (f"{text} {_MAY_BE_LOST}" for text in lost.values())
    known = {left.place for left in servers.left.values()}
    for name, server in servers.connected.items():
        if name not in known and (started := server.origins & young):
            yield f"{title_of(servers.alike(server.node))}: {_start_problem(server, started)}"
    for mount in servers.mounts.values():
        if mount.mount.certain and (started := mount.origins & young):
            yield f"{mount.title}: {_start_problem(mount, started)}"


def _start_problem(server: NodeServer | MountServers, started: frozenset[int]) -> str:
    return f"{server.named(started)} started during the stop, so another ended; {_MAY_BE_LOST}"


def _end_problem(server: NodeServer | MountServers, ends: ServerEnds) -> str:
    if ended := server.lasting & ends.before:
        return f"{server.named(ended)} ended before the guest; {_MAY_BE_LOST}"
    return ""


def _late_end_problem(server: NodeServer | MountServers, ends: ServerEnds) -> str:
    """Explain why the server may have stopped serving before the guest ended, although it ended
    later."""
    if stopping := server.serving & ends.stopping:
        return f"{server.named(stopping)} was being stopped when the guest ended"
    if after := server.lasting & ends.after:
        return f"{server.named(after)} ended at almost the same time as the guest"
    return ""


def _data_problem(server: NodeServer, ends: ServerEnds, closed_first: bool | None) -> str:
    """Explain why the server may have lost data that it had acknowledged; "" if nothing indicates
    this."""
    if server.outlived(closed_first):
        return ""
    if problem := _end_problem(server, ends):
        return problem
    if server.behind_unknown:
        return f"not all servers that {server.title} may use were found; one may have ended first"
    if server.peer is None and server.local:
        return "its server was not found, and may have ended before the guest"
    return ""


def _connection_problem(server: NodeServer, ends: ServerEnds, closed_first: bool | None) -> str:
    """Explain why the server may have closed the connection before the guest did; "" if nothing
    indicates this."""
    if server.outlived(closed_first):
        return ""
    if problem := _late_end_problem(server, ends):
        return problem
    if server.peer is None and closed_first is False:
        return "its server closed the connection before the guest did"
    if server.peer is None and closed_first is None and server.is_nbd_over_tcp:
        return "whether its server closed the connection before the guest did is unknown"
    return ""


def _was_kept(nodes: Iterable[Node], connected_at: int, ended: int) -> bool:
    """Return whether the `reconnect-delay` of every node was still running at `ended`: QEMU would
    then have kept the data of a lost server."""
    return all(
        node.reconnect is not None and ended < connected_at + node.reconnect * USEC_PER_SEC
        for node in nodes
    )
