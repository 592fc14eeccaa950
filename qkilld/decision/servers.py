"""Say whether the servers of a guest's network disks may have been gone before the guest ended.
Pure.

If a server ends before the guest has closed its disk, QEMU's last writes and flushes fail. QEMU
then exits at once, with code 0. Neither shows in a later sample, because there is none. So the
servers are looked for before SIGTERM, and at the end it is compared which process ended first.

A server that is stopped closes its connections some time before it ends, so its end soon after the
guest's is a risk, too (SETTLE). With TCP, the kernel may prove that the guest closed the connection
first. Of a server on another host, nothing else is known.

A server that exits when its client disconnects (Peer.leaves) ends before the guest in every
ordinary stop, so its end proves nothing. The same holds for a process that a server has forked for
the connection, but its parent remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.job import Risk
from qkilld.model.sample import Node, Peer, Sample

SETTLE: Final = USEC_PER_SEC * 3 // 10
"""How long (µs) a server must run after the guest's end, unless something else shows that it did
not close its connections before. An idle QEMU or qemu-nbd exits a few ms after it has closed
them."""


@dataclass(frozen=True, slots=True)
class NodeServer:
    """The server to which a node was connected."""

    node: Node
    inode: int
    """The guest's end of the connection."""
    at: int
    """When the connection was first seen; CLOCK_MONOTONIC, µs."""
    local: bool
    """Whether the server is certainly a process of this host."""
    peer: Peer | None
    """None if it was not found."""
    tcp_id: str = ""
    """Socket.tcp_id"""

    @property
    def lasting(self) -> frozenset[int]:
        """The processes, on the way to the storage, that remain if only the guest disconnects."""
        return frozenset(peer.parent or peer.pid for peer in _chain(self.peer) if not peer.leaves)

    @property
    def serving(self) -> frozenset[int]:
        """All processes on the way to the storage."""
        return frozenset(peer.pid for peer in _chain(self.peer))

    @property
    def title(self) -> str:
        if self.peer is None:
            return "its server"
        return f"its server {self.peer.command} (process {self.peer.pid})"


@dataclass(frozen=True, slots=True)
class StorageServers:
    """The servers of a guest's network disks, as far as samples have shown them."""

    connected: Mapping[str, NodeServer] = field(default_factory=dict)
    """By the name of the node."""
    disconnected: tuple[Node, ...] = ()
    """The nodes that have never been seen connected, though they should be."""

    @property
    def unfound(self) -> bool:
        """Whether a local server was not found, so that another sample may find it."""
        return any(one.local and one.peer is None for one in self.connected.values())

    @property
    def lasting(self) -> frozenset[int]:
        """NodeServer.lasting of all nodes."""
        return frozenset(pid for one in self.connected.values() for pid in one.lasting)

    @property
    def serving(self) -> frozenset[int]:
        """NodeServer.serving of all nodes."""
        return frozenset(pid for one in self.connected.values() for pid in one.serving)


def follow_servers(before: StorageServers | None, sample: Sample) -> StorageServers | None:
    """Return the servers after one more sample. None if no sample has shown any connections.

    A node that was connected and is not any more keeps its server: an exiting QEMU closes its
    connections.
    """
    if sample.sockets is None or sample.nodes is None:
        return before
    known = dict(before.connected) if before is not None else {}
    nodes = [node for node in sample.nodes if _may_lose_data(node)]
    for node in nodes:
        for socket in sample.sockets:
            if socket.node != node.name:
                continue
            old = known.get(node.name)
            same = old is not None and old.inode == socket.inode
            if old is None or not same or (old.peer is None and socket.peer is not None):
                at = old.at if old is not None and same else sample.at
                local = socket.family == "unix"
                known[node.name] = NodeServer(
                    node, socket.inode, at, local, socket.peer, socket.tcp_id
                )
    if before is None:
        candidates: Sequence[Node] = [node for node in nodes if _should_be_connected(node, sample)]
    else:
        candidates = before.disconnected
    return StorageServers(known, tuple(node for node in candidates if node.name not in known))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEnds:
    """What the servers did around the end of the guest. Times are CLOCK_MONOTONIC in µs."""

    before: frozenset[int] = frozenset()
    """The processes that ended before the guest, or may have."""
    after: frozenset[int] = frozenset()
    """The processes that ended within SETTLE after it, or are ending."""
    stopping: frozenset[int] = frozenset()
    """The processes that qkilld is stopping."""
    closed_first: Mapping[str, bool] = field(default_factory=dict)
    """By the name of the node: whether the guest closed the connection before the server did. False
    proves nothing for a server of this host: it often closes the connection between QEMU's request
    to disconnect and QEMU's shutdown(2): in 38 of 120 stops with a load of 3 on two processors. For
    a server beyond a network without latency, it was 1 of 60 with a load of 15."""
    guest_started: int
    guest_ended: int


def needs_settling(servers: StorageServers | None, closed_first: Mapping[str, bool]) -> bool:
    """Return whether only time can show whether a server was being stopped when the guest ended.
    `closed_first` as in ServerEnds."""
    known = servers.connected if servers is not None else {}
    return any(one.lasting and not closed_first.get(name) for name, one in known.items())


def risks_of_servers(servers: StorageServers | None, ends: ServerEnds) -> tuple[Risk, ...]:
    """Return the risks after QEMU has exited; () if no server was missing, as far as visible.

    Until the node's reconnect-delay has passed, QEMU keeps the data and does not exit (risk.py).
    """
    if servers is None:
        text = "its connections to the servers of its disks could not be read"
        return (Risk("unknown", text),)
    texts = []
    for node in servers.disconnected:
        if not _was_kept(node, ends.guest_started, ends.guest_ended):
            texts.append(f"{_title(node)} had no connection to its server")
    for name, server in servers.connected.items():
        was_kept = _was_kept(server.node, server.at, ends.guest_ended)
        if not was_kept and (problem := _problem(server, ends, ends.closed_first.get(name))):
            texts.append(f"{_title(server.node)}: {problem}")
    return tuple(Risk("unknown", text) for text in texts)


def _problem(server: NodeServer, ends: ServerEnds, closed_first: bool | None) -> str:
    """Say why the server may have closed the connection before the guest did; "" if it did not, as
    far as visible."""
    if closed_first:
        return ""
    if server.lasting & ends.before:
        return f"{server.title} ended before the guest"
    if server.serving & ends.stopping:
        return f"{server.title} was being stopped when the guest ended"
    if server.lasting & ends.after:
        return f"{server.title} ended at almost the same time as the guest"
    if server.peer is None and server.local:
        return "its server was not found, and may have ended before the guest"
    if server.peer is None and closed_first is False:
        return "its server closed the connection before the guest did"
    return ""


def _may_lose_data(node: Node) -> bool:
    """Return whether QEMU may hold data for the node. It holds none of a vhost-user device."""
    return not node.read_only and node.protocol != "vhost-user"


def _should_be_connected(node: Node, sample: Sample) -> bool:
    """Return whether a missing connection means that the node has lost its server, rather than that
    QEMU has closed the node, or uses a connection that the command line does not name."""
    if any(socket.node == node.name for socket in sample.sockets or ()):
        return True
    return node.served is False or (node.protocol == "nbd" and sample.pluggable is False)


def _was_kept(node: Node, connected_at: int, ended: int) -> bool:
    """Return whether QEMU would still have kept the data if it had lost the server."""
    if node.reconnect is None:
        return False
    return ended < connected_at + node.reconnect * USEC_PER_SEC


def _chain(peer: Peer | None) -> Iterator[Peer]:
    if peer is not None:
        yield peer
        for one in peer.behind:
            yield from _chain(one)


def _title(node: Node) -> str:
    return f"{node.protocol} node {node.name}"
