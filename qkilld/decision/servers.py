"""Follow the servers of a guest's network disks and FUSE file systems in its samples. Pure.

decision.server_risks decides what their ends mean. If a server ends before the guest has closed its
disk, QEMU exits at once, before another sample can be taken, so qkilld looks for the servers before
SIGTERM.

A server that exits when its client disconnects (Peer.leaves) ends before the guest in every
ordinary stop, so its end proves nothing. The same is true of a process that a server has forked for
the connection: its parent is watched instead, because the parent continues to run.

If several nodes use one server (Node.group), it is unknown which connection belongs to which node.
Each connection is assigned to an arbitrary one of these nodes, so a risk of one node may really be
a risk of another node in its group.

A server that the guest has left (Left) is watched until the guest ends, because it may still run:
for example, a proxy may choose another server for a new connection.

The servers of FUSE file systems that contain writable images are followed in the same way. If it is
uncertain which process is the server, all processes that may be are followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import islice
from typing import Final

from qkilld.decision.node_groups import group_name, title_of
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Mount, Node, Peer, Sample, Socket

_MAX_NAMES: Final = 4
MAX_LEFT: Final = 32
"""At most this many servers that a guest has left are remembered."""
MAX_MOUNTS: Final = 64
"""At most this many FUSE file systems of one guest are followed."""
_MAX_CANDIDATES: Final = 16
"""If it is uncertain which process serves a file system, at most this many are remembered."""
_ONE_CONNECTION: Final = frozenset({"nbd", "iscsi"})
"""The protocols for which a lost connection may mean a lost server, even if the server is unknown.
Clients of other protocols, such as rbd, have many connections, and close some of them at times."""


@dataclass(frozen=True, slots=True)
class NodeServer:
    """The server to which a node was last connected."""

    node: Node
    inode: int
    """The inode of the guest's end of the connection."""
    at: int
    """When the connection was first seen; CLOCK_MONOTONIC, µs."""
    local: bool
    """Whether the server is certainly a process of this host."""
    peer: Peer | None
    """The server's process; None if it was not found."""
    tcp_id: str = ""
    """Socket.tcp_id"""

    @property
    def lasting(self) -> frozenset[int]:
        """The processes between the guest and the storage that continue to run when the guest
        disconnects."""
        return _lasting(_chain([self.peer]))

    @property
    def serving(self) -> frozenset[int]:
        """All processes between the guest and the storage."""
        return _serving(_chain([self.peer]))

    @property
    def origins(self) -> frozenset[int]:
        """Like `serving`, but instead of a process that was forked for the connection, its
        parent."""
        return _origins(_chain([self.peer]))

    @property
    def behind_unknown(self) -> bool:
        """Whether there may be servers behind this one that were not found."""
        return any(peer.behind_unknown for peer in _chain([self.peer]))

    @property
    def is_nbd_over_tcp(self) -> bool:
        """Whether this is NBD over TCP, for which the kernel may know which end closed first."""
        return self.node.protocol == "nbd" and bool(self.tcp_id)

    def outlived(self, closed_first: bool | None) -> bool:
        """Return whether the server certainly served the connection until the guest closed it.
        False if another server is, or may be, behind this one, because the connection proves
        nothing about that server."""
        is_last = self.peer is None or not (self.peer.behind or self.peer.behind_unknown)
        return bool(closed_first) and is_last

    @property
    def title(self) -> str:
        return "its server" if self.peer is None else f"its server {_process(self.peer)}"

    def named(self, pids: frozenset[int]) -> str:
        """Name the servers between the guest and the storage that are in `pids`."""
        return _named([self.peer], pids) if self.peer is not None else self.title


@dataclass(frozen=True, slots=True)
class MountServers:
    """The servers of a FUSE file system that contains an image open for writing."""

    mount: Mount

    @property
    def lasting(self) -> frozenset[int]:
        """The processes that should continue to run until the guest ends. If the mount is not
        `certain`, these are all processes that may be the server."""
        return _serving(self.mount.servers or ()) | _lasting(self._behind())

    @property
    def serving(self) -> frozenset[int]:
        """The servers of the file system, and those behind them."""
        return _serving(self.mount.servers or ()) | _serving(self._behind())

    @property
    def origins(self) -> frozenset[int]:
        """As in NodeServer."""
        return _serving(self.mount.servers or ()) | _origins(self._behind())

    def _behind(self) -> Iterator[Peer]:
        """Yield the servers behind those of the file system, if the mount is `certain`."""
        servers = (self.mount.servers or ()) if self.mount.certain else ()
        return _chain(other for server in servers for other in server.behind if other.certain)

    @property
    def title(self) -> str:
        return f"{self.mount.kind} file system {self.mount.number}"

    def named(self, pids: frozenset[int]) -> str:
        """Name the servers that are in `pids`."""
        named = _named(self.mount.servers or (), pids)
        return named if self.mount.certain else f"what may be {named}"


@dataclass(frozen=True, slots=True)
class Left:
    """A process that has served a disk or file system of the guest, but does not any more."""

    place: str
    """The node's name, or Mount.number."""
    text: str
    """What was lost: for example, "nbd node disk lost its server qemu-nbd (process 90)"."""


@dataclass(frozen=True, slots=True)
class SavedServer:
    """A process that the next daemon watches as if the guest had left it."""

    pid: int
    started: int
    """When the process started; CLOCK_MONOTONIC, µs."""
    left: Left


@dataclass(frozen=True, slots=True)
class StorageServers:
    """The servers of a guest's network disks, as far as samples have shown them."""

    connected: Mapping[str, NodeServer] = field(default_factory=dict)
    """The server of each connected node, keyed by the node's name."""
    disconnected: tuple[Node, ...] = ()
    """The nodes that should be connected, but were not connected in any sample."""
    unchecked: tuple[Node, ...] = ()
    """Like `disconnected`, but it is unknown whether the nodes should be connected. Only
    samples with detail show whether their servers listen."""
    groups: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    """All nodes of each group, keyed by Node.group; for a node without a group, by its name."""
    mounts: Mapping[str, MountServers] = field(default_factory=dict)
    """Keyed by Mount.number."""
    left: Mapping[int, Left] = field(default_factory=dict)
    """The processes that the guest has left, keyed by process id. They may still run."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """For each node that has lost its connection to a server that was not found: what was lost.
    Keyed by the node's name."""
    incomplete: bool = False
    """Whether more servers were found than are remembered."""

    @property
    def unfound(self) -> bool:
        """Whether another sample may show more: a local server was not found yet, it is not known
        yet whether a server exits with its client, or servers behind a server are missing."""
        missing = any(one.local for one in self.connected.values() if one.peer is None)
        return missing or not _are_known(self._chain())

    @property
    def lacks_connections(self) -> bool:
        """Whether a node should be connected, as far as known, but is not."""
        nodes = (*self.disconnected, *self.unchecked)
        return any(node.protocol in _ONE_CONNECTION for node in nodes)

    def alike(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes in the group of `node` (Node.group), including `node` itself."""
        return self.groups.get(node.group, (node,))

    @property
    def lasting(self) -> frozenset[int]:
        """The processes that should continue to run until the guest ends, and those that it has
        left."""
        mounts = (one.lasting for one in self.mounts.values())
        return _lasting(self._chain()).union(self.left, *mounts)

    @property
    def serving(self) -> frozenset[int]:
        """The processes between the guest and the storage."""
        mounts = (one.serving for one in self.mounts.values())
        return _serving(self._chain()).union(*mounts)

    @property
    def to_save(self) -> dict[int, Left]:
        """What the next daemon should know: the processes in `lasting` as if the guest had left
        them all."""
        servers: dict[str, NodeServer | MountServers] = {**self.connected, **self.mounts}
        present = {
            pid: _left(place, self._title(server), server, pid)
            for place, server in servers.items()
            for pid in server.lasting
        }
        return {**present, **self.left}

    def with_left(self, left: Mapping[int, Left]) -> StorageServers:
        """Return the same with these processes in `left`, except those that serve their place."""
        groups = {
            name: group
            for group, nodes in self.groups.items()
            for name in (node.name for node in nodes)
        }
        present: dict[str, frozenset[int]] = {}
        others = {}
        for pid, one in left.items():
            # It is unknown which connection of a group belongs to which node.
            group = groups.get(one.place, "")
            if (key := group or one.place) not in present:
                present[key] = self._processes_at(group, one.place)
            if pid not in present[key]:
                others[pid] = one
        return self if others == self.left else replace(self, left=others)

    def _processes_at(self, group: str, mount: str) -> frozenset[int]:
        """Return the processes that serve the nodes of a group or, if it is "", a mount."""
        if group:
            nodes = (self.connected.get(node.name) for node in self.groups[group])
            peers = tuple(_chain(one.peer for one in nodes if one is not None))
            return _serving(peers) | _lasting(peers)
        server = self.mounts.get(mount)
        return frozenset() if server is None else server.serving | server.lasting

    def _title(self, server: NodeServer | MountServers) -> str:
        if isinstance(server, MountServers):
            return server.title
        return title_of(self.alike(server.node))

    def _chain(self) -> Iterator[Peer]:
        return _chain(one.peer for one in self.connected.values())


NO_SERVERS: Final = StorageServers()


def follow_servers(before: StorageServers | None, sample: Sample) -> StorageServers | None:
    """Return the servers after one more sample; None if the connections were unreadable in all
    samples.

    A node without a connection keeps its last server, because QEMU closes its connections when it
    exits. For the same reason, a mount keeps its servers.
    """
    servers = _follow_nodes(before, sample)
    if servers is None:
        return None
    servers = _follow_mounts(servers, sample)
    if servers.left:
        servers = servers.with_left(servers.left)
    if len(servers.left) <= MAX_LEFT and len(servers.mounts) <= MAX_MOUNTS:
        return servers
    return replace(
        servers,
        left=dict(islice(servers.left.items(), MAX_LEFT)),
        mounts=dict(islice(servers.mounts.items(), MAX_MOUNTS)),
        incomplete=True,
    )


def _follow_mounts(servers: StorageServers, sample: Sample) -> StorageServers:
    held = {image.mount for image in sample.images or ()}
    mounts, left, incomplete = dict(servers.mounts), dict(servers.left), servers.incomplete
    for mount in sample.mounts or ():
        is_held = sample.images is None or mount.number in held
        if not (mount.number and mount.servers and is_held):
            continue
        old, new = mounts.get(mount.number), MountServers(mount)
        if old is not None and not _is_better_mount(mount, old.mount):
            continue
        if old is not None and mount.certain and old.mount.certain:
            left |= _what_was_left(mount.number, new.title, old, new)
        elif old is not None and not mount.certain:
            # The server need not have been among the processes that earlier samples showed.
            known = {server.pid: server for server in (*(old.mount.servers or ()), *mount.servers)}
            new = MountServers(replace(mount, servers=tuple(known.values())[:_MAX_CANDIDATES]))
            incomplete = incomplete or len(known) > _MAX_CANDIDATES
        mounts[mount.number] = new
    if mounts == servers.mounts and incomplete is servers.incomplete:
        return servers
    return replace(servers, mounts=mounts, left=left, incomplete=incomplete)


def _is_better_mount(mount: Mount, old: Mount) -> bool:
    """Return whether the newest sample may show more servers of a mount than `old`."""
    if mount.certain is not old.certain:
        return mount.certain
    pids, old_pids = ({one.pid for one in m.servers or ()} for m in (mount, old))
    if not mount.certain:
        return bool(pids - old_pids)
    pairs = zip(mount.servers or (), old.servers or (), strict=False)
    return pids == old_pids and any(_is_better(*pair) for pair in pairs)


def _follow_nodes(before: StorageServers | None, sample: Sample) -> StorageServers | None:
    if sample.nodes is None:
        return before
    groups = _groups_that_may_lose_data(sample.nodes)
    if not groups and (before is None or before == NO_SERVERS):
        return NO_SERVERS
    if sample.sockets is None:
        return before
    group_of = {node.name: name for name, nodes in groups.items() for node in nodes}
    sockets: dict[str, list[Socket]] = {}
    for socket in sample.sockets:
        if socket.node in group_of:
            sockets.setdefault(group_of[socket.node], []).append(socket)
    nodes_now = {node.name: node for nodes in groups.values() for node in nodes}
    # Later, QEMU may have closed the connection of unknown use that was the node's.
    is_clear = before is None and not any(map(_is_unknown, sample.sockets))
    if before is None:
        before = StorageServers(unchecked=tuple(nodes_now.values()))
    known, left, lost = dict(before.connected), dict(before.left), dict(before.lost)
    for name, nodes in groups.items():
        for old, new in _follow_group(known, nodes, sockets.get(name, ()), sample.at):
            title = title_of(nodes)
            left |= _what_was_left(new.node.name, title, old, new)
            if old.peer is None and old.inode != new.inode and old.node.protocol in _ONE_CONNECTION:
                lost[new.node.name] = f"{title} lost its connection"
    unchecked = [nodes_now.get(node.name, node) for node in before.unchecked]
    unserved = {node.name: node for node in unchecked if _has_lost(node, is_clear)}
    unchecked = [one for one in unchecked if one.served is None and one.name not in unserved]
    return StorageServers(
        connected=known,
        disconnected=tuple(
            node for node in (*before.disconnected, *unserved.values()) if node.name not in known
        ),
        unchecked=tuple(node for node in unchecked if node.name not in known),
        groups=groups,
        mounts=before.mounts,
        left=left,
        lost=lost,
        incomplete=before.incomplete,
    )


def _groups_that_may_lose_data(nodes: Iterable[Node]) -> dict[str, tuple[Node, ...]]:
    """Return the groups (Node.group) in which a node may lose data. A node without a group forms
    its own group, with its name as the key."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(group_name(node), []).append(node)
    return {name: tuple(group) for name, group in groups.items() if any(map(_may_lose_data, group))}


def _follow_group(
    known: dict[str, NodeServer], nodes: Sequence[Node], sockets: Sequence[Socket], at: int
) -> Iterator[tuple[NodeServer, NodeServer]]:
    """Add the connections of one group to `known`. Yield each entry that was replaced, and the new
    one."""
    names = {node.name: node for node in nodes}
    inodes = {socket.inode for socket in sockets}
    users = {known[name].inode: name for name in names if name in known}
    free = [one for one in names if one not in known or known[one].inode not in inodes]
    free.sort(key=lambda one: one in known)
    free_names = dict.fromkeys(reversed(free))  # Names are taken from the end.
    for socket in sockets:
        name = users.get(socket.inode, "")
        if not name:
            if not free_names:
                continue
            name = socket.node if socket.node in free_names else next(reversed(free_names))
            del free_names[name]
        old = known.get(name)
        if old is None or old.inode != socket.inode:
            known[name] = _node_server(names[name], socket, at)
        elif _is_better(socket.peer, old.peer):
            known[name] = _node_server(names[name], socket, old.at)
        else:
            continue
        if old is not None:
            yield old, known[name]


def _what_was_left(
    place: str, title: str, old: NodeServer | MountServers, new: NodeServer | MountServers
) -> dict[int, Left]:
    """Return the processes that served the place before, and do not any more."""
    pids = (old.lasting | old.serving) - (new.lasting | new.serving)
    return {pid: _left(place, title, old, pid) for pid in sorted(pids)}


def _left(place: str, title: str, server: NodeServer | MountServers, pid: int) -> Left:
    return Left(place, f"{title} lost {server.named(frozenset({pid}))}")


def _is_better(peer: Peer | None, old: Peer | None) -> bool:
    """Return whether a connection's newest sample shows more of its servers than before. If it
    shows fewer, the server behind a server may have been closed as the guest exits."""
    if old is None or not _is_known(peer):
        return old is None
    return not _is_known(old) or bool(_serving(_chain([peer])) - _serving(_chain([old])))


def _node_server(node: Node, socket: Socket, at: int) -> NodeServer:
    # For iSCSI, a local address does not show that the server is a process: the server may be the
    # kernel itself.
    is_here = node.protocol == "nbd" and _connects_to_itself(socket.tcp_id)
    local = socket.family == "unix" or is_here
    return NodeServer(node, socket.inode, at, local, socket.peer, socket.tcp_id)


def _connects_to_itself(tcp_id: str) -> bool:
    """Return whether both ends have the same address. `tcp_id`, in hexadecimal: one byte, two ports
    (4 bytes in total), and two addresses (16 bytes each)."""
    source, target = tcp_id[10:42], tcp_id[42:74]
    return bool(target) and source == target


def _is_known(peer: Peer | None) -> bool:
    return peer is not None and _are_known(_chain([peer]))


def _are_known(peers: Iterable[Peer]) -> bool:
    return all(peer.leaves is not None and not peer.behind_unknown for peer in peers)


def _lasting(peers: Iterable[Peer]) -> frozenset[int]:
    return _origins(peer for peer in peers if not peer.leaves)


def _origins(peers: Iterable[Peer]) -> frozenset[int]:
    return frozenset(peer.parent or peer.pid for peer in peers)


def _serving(peers: Iterable[Peer]) -> frozenset[int]:
    return frozenset(peer.pid for peer in peers)


def _may_lose_data(node: Node) -> bool:
    """Return whether QEMU may hold data for the node, which it never does for a vhost-user
    device."""
    return not node.read_only and node.protocol != "vhost-user"


def _has_lost(node: Node, is_clear: bool) -> bool:
    """Return whether a missing connection means that the node has lost its server. QEMU connects an
    NBD node when it opens the node. But through a monitor, QEMU may have closed the node, which a
    flush shows. `is_clear`: this is the first sample, and the use of each connection is known."""
    return node.served is False or (node.protocol == "nbd" and is_clear)


def _is_unknown(socket: Socket) -> bool:
    return socket.role == "unknown" or (socket.role == "storage" and not socket.node)


def _chain(peers: Iterable[Peer | None]) -> Iterator[Peer]:
    """Yield the servers, and the servers behind them that certainly work for the guest. Each server
    is yielded only once, although several connections or servers may use it."""
    waiting = [peer for peer in peers if peer is not None]
    seen: set[int] = set()
    while waiting:
        peer = waiting.pop()
        if id(peer) not in seen:
            seen.add(id(peer))
            yield peer
            waiting += [other for other in peer.behind if other.certain]


def _named(servers: Sequence[Peer], pids: frozenset[int]) -> str:
    """Name the processes of _chain(servers) that are in `pids`, or whose parents are."""
    names: list[str] = []
    for peer in _chain(servers):
        if pid := next((pid for pid in (peer.pid, peer.parent) if pid in pids), 0):
            is_direct = any(peer is one for one in servers)
            behind = "it" if names else f"its server {_process(servers[0])}"
            name = f"{peer.command} (process {pid})"
            names.append(f"its server {name}" if is_direct else f"{name} behind {behind}")
    return " and ".join(names[:_MAX_NAMES])


def _process(peer: Peer) -> str:
    return f"{peer.command} (process {peer.pid})"
