"""Read the connections of a process: its connected sockets, and their queues.

The links of its descriptors show the inodes of its sockets (files.py). The sockets of our network
namespace are read once for all processes, through sock_diag (sockdiag.py). If a process is in
another network namespace, its sockets are read from /proc/PID/net, which shows less.

Needs the ptrace right for another user's process. Sources: sock_diag(7), proc_pid_net(5), unix(7).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import read_bounded
from qkilld.adapters.unix_table import UnixRow, parse_unix_row
from qkilld.debug_log import note_once
from qkilld.evidence import files, sockdiag
from qkilld.evidence.block_graph import BlockGraph, lonely_nodes, without_link
from qkilld.evidence.files import Descriptors
from qkilld.evidence.other_namespaces import OtherNamespaces
from qkilld.evidence.sockdiag import SocketTable, Unreadable
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.sample import Node, Socket

__all__ = ["SocketReader", "SocketTable"]

PROC: Final = Path("/proc")
MAX_BYTES: Final = 4 << 20
"""A file in /proc/PID/net that is longer than this (about 28,000 sockets) counts as unreadable."""

# The names in /proc/net/protocols. Since Linux 5.15, unix stream sockets have a name of their own.
_UNIX: Final = frozenset({"UNIX", "UNIX-STREAM"})
_TCP: Final = frozenset({"TCP", "TCPv6"})
_UNSEEN: Final = frozenset({"MPTCP", "MPTCPv6", "SCTP", "SCTPv6", "SMC", "SMC6", "AF_VSOCK"})

_ESTABLISHED: Final = b"01"
_LISTEN: Final = b"0A"


class _StreamSocket(NamedTuple):
    id: bytes
    client: bool


class _Use(NamedTuple):
    """The purpose of a connection."""

    role: str
    node: str


_UNKNOWN: Final = _Use("unknown", "")
_OTHER: Final = _Use("other", "")
_SERVICES: Final = re.compile(
    rb"(/var)?/run/(dbus|systemd|nscd|nslcd|avahi-daemon|user/[0-9]+/(bus$|systemd))"
    rb"|/var/lib/sss/pipes/|\0?/tmp/(dbus-|\.X11-unix/)"
)
"""The prefixes of the socket names of system services. These services store no data of guests.
Anybody can give a socket such a name, but QEMU connects to it only if the guest's owner wants
that."""
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_MAX_SETTLED: Final = 16
"""If a process has more sockets than this, read() does not return an earlier result, because
reading the kernel's table is cheaper than checking the link of each descriptor."""
_NONE: Final = frozenset[int]()
_STANDARD: Final = (0, 1, 2)
"""Connections with these descriptors are normally standard streams. They count as storage only if
the command line says so. This may happen: the disks of a QEMU that was started without standard
streams may get these numbers."""


class SocketReader:
    """Reads the connected stream sockets of one process. Not thread-safe. Keeps no files open."""

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self._pid, self._proc = pid, proc
        self._protocols: dict[int, str] | None = None
        self._connections: dict[int, _StreamSocket | None] = {}
        self._foreign = False
        self._graph: BlockGraph | None = None
        self._ends: _Ends | None = None
        self._given_names: dict[bytes | None, _Use] | None = None
        """The purposes of the listening sockets that were passed to QEMU as descriptors, keyed by
        the names of the sockets; None until needed."""
        self._numbers: dict[int, int] = {}
        self._own_names: set[bytes] | None = None
        """The names of the unix sockets that the process listens on; None until needed."""
        self._peers: dict[int, int] = {}
        self._listed = _NONE
        """The inodes of the connections that the last read() returned."""
        self.accepted: list[int] = []
        """The inodes of the connections that the process accepted from clients."""
        self.has_unknown_peers = False
        """Whether the last result of peers() is incomplete, because other ends on this host were
        unreadable or had not accepted the connection yet."""
        self._lost = False
        self._in_its_namespace: Set[int] = _NONE
        """The unix sockets of the process's network namespace, if that is not ours."""
        self._settled: tuple[Socket, ...] | None = None
        """A result that read() may return again while the process has the same sockets; None if the
        kernel must be queried."""

    def refresh(
        self, descriptors: Descriptors | None = None, graph: BlockGraph | None = None
    ) -> None:
        """List the sockets of the process again. Never raises.

        Without `graph`, which comes from the command line, the purpose of every connection is
        unknown. `descriptors`: from files.read_descriptors, if the caller has just called it. Costs
        20 µs, and 3 µs for each new socket. Without `descriptors`, it costs 4 µs more for each
        descriptor.
        """
        if descriptors is None:
            descriptors = files.read_descriptors(self._pid, self._proc)
        known, self._protocols = self._protocols or {}, None
        self._settled = self._own_names = None
        if descriptors is None or descriptors.too_many:
            return
        try:
            ours = os.readlink(f"{self._proc}/{sockdiag.namespace_of}/ns/net")  # noqa: PTH115
            its = os.readlink(f"{self._proc}/{self._pid}/ns/net")  # noqa: PTH115 - half the cost
            protocols = {i: known.get(i) or self._protocol(n) for n, i in descriptors.sockets}
        except OSError as error:
            note_once("looking for sockets", error)
            return
        if graph is not self._graph or self._ends is None:
            self._ends = None if graph is None else _ends_of(graph)
        self._foreign, self._graph = ours != its, graph
        self._numbers = {inode: int(number) for number, inode in descriptors.sockets}
        self._protocols = {inode: protocol for inode, protocol in protocols.items() if protocol}
        # Forget sockets that were not connected, so that they are queried again: they may be
        # connected now.
        self._connections = {
            inode: connection
            for inode, connection in self._connections.items()
            if connection is not None and inode in self._protocols
        }

    def read(self, table: SocketTable, has_run: bool = True) -> tuple[Socket, ...] | None:
        """Read the queues of all connections, in order of inode. Connections are established TCP
        sockets, and connected unix sockets whose other end is not closed.

        Return None if the connections are unknown: refresh() failed, the kernel does not report
        them, a socket is of an unsupported kind (vsock, MPTCP, SCTP, SMC), or the process is in
        another network namespace and the other ends of its unix sockets are ambiguous.

        A unix socket is a client if it has no name, and its other end has a name or is invisible. A
        TCP socket is a client if no socket listened on its local port when it was first seen. This
        costs 5 µs for each unix socket and 20 µs for each TCP socket, besides reading the table.

        If all sockets are unix sockets, and each listens or is known not to be storage, the same
        result is returned until refresh() or until a descriptor changes. `has_run`: the process may
        have run since the last call. If it has not, it has the same descriptors, and they are not
        checked.
        """
        if self._settled is not None and not (has_run and self._changed()):
            return self._settled
        protocols = self._protocols
        if protocols is None or not _UNSEEN.isdisjoint(protocols.values()):
            if protocols is not None:
                note_once("reading sockets", "it has one of an unsupported kind")
            return None
        if self._foreign and protocols:
            return self._read_foreign(protocols, table)
        sockets: list[Socket] = []
        self._peers, self._given_names = {}, None
        self.accepted = []
        table.expect_tcp(
            inode
            for inode, protocol in protocols.items()
            if protocol in _TCP and inode not in self._connections
        )
        try:
            for inode in sorted(protocols):
                read = self._tcp if protocols[inode] in _TCP else self._unix
                if (socket := read(inode, table)) is not None:
                    sockets.append(socket)
            settled = self._settles(sockets, protocols, table)
        except Unreadable as error:
            note_once("reading sockets", error)
            return None
        inodes = frozenset(socket.inode for socket in sockets) if sockets else _NONE
        self._lost = bool(self._listed - inodes) or (self._lost and inodes <= self._listed)
        self._listed = inodes
        result = tuple(sockets)
        self._settled = result if settled else None
        return result

    def _settles(
        self, sockets: Sequence[Socket], protocols: Mapping[int, str], table: SocketTable
    ) -> bool:
        """Return False if a socket of the process is, or could become, a connection to storage.
        Raises Unreadable."""
        if len(self._numbers) > _MAX_SETTLED or not _UNIX.issuperset(protocols.values()):
            return False
        rest = protocols.keys() - {socket.inode for socket in sockets}
        return all(socket.role == "other" for socket in sockets) and all(
            table.is_listening(inode) for inode in rest
        )

    def _changed(self) -> bool:
        """Return whether a descriptor no longer refers to the same socket."""
        try:
            return any(
                os.readlink(f"{self._proc}/{self._pid}/fd/{number}")  # noqa: PTH115 - half the cost
                != f"socket:[{inode}]"
                for inode, number in self._numbers.items()
            )
        except OSError:
            return True

    def hidden(self, table: SocketTable) -> set[int]:
        """Return the process's unix sockets that are listed neither in our network namespace nor in
        that of the process. They may be connected to a client in a third namespace, which is not
        read. Raises Unreadable."""
        return {
            inode
            for inode, protocol in (self._protocols or {}).items()
            if protocol in _UNIX
            and inode not in self._in_its_namespace
            and not table.has_unix(inode)
        }

    @property
    def lost(self) -> bool:
        """Return whether refresh() is needed soon: a connection was lost and no new one was seen
        since then, or a TCP socket was not connected. QEMU may connect again with the same
        descriptor, so a new connection need not change the number of descriptors."""
        return self._lost or None in self._connections.values()

    def served(
        self,
        nodes: Sequence[Node],
        sockets: Sequence[Socket],
        table: SocketTable,
        elsewhere: OtherNamespaces,
    ) -> tuple[Node, ...]:
        """Return the nodes. For nodes with an address on this host that have, or may have, no
        connection, set Node.served: whether a socket listens at this address."""
        if self._graph is None or self._foreign:
            return tuple(nodes)
        ends = self._graph.ends_of(lonely_nodes(nodes, [socket.node for socket in sockets]))
        served: dict[str, set[bool | None]] = {}
        root = self._root() if any(end.path for end in ends) else ""
        try:
            for end, names in ends.items():
                if end.path:
                    path = root + end.path if end.path.startswith("/") else end.path
                    matches = partial(_listens_at, path)
                    # If such a socket exists only in another namespace, the result is unknown,
                    # because the socket may belong to another server.
                    listens = table.listens(matches) or (
                        False if elsewhere.listens(matches) is False else None
                    )
                elif end.port is not None and end.host in _LOCAL:
                    listens = table.listens_on(end.port)
                else:
                    continue
                for name in names:
                    served.setdefault(name, set()).add(listens)
        except Unreadable as error:
            note_once("looking for listening servers", error)
            return tuple(nodes)
        return tuple(replace(node, served=_any(served.get(node.name))) for node in nodes)

    def _root(self) -> str:
        """Return the directory that -chroot has made QEMU's root; "" if there is none, or if a file
        system is mounted in it. QEMU looks up paths in this directory when it connects again."""
        directory = f"{self._proc}/{self._pid}"
        try:
            root = os.readlink(f"{directory}/root")  # noqa: PTH115 - half the cost
        except OSError as error:
            note_once("reading the root directory", error)
            return ""
        # mountinfo of the process lists only the mounts in its root directory.
        mounted = root == "/" or read_bounded(f"{directory}/mountinfo", MAX_BYTES) != b""
        return "" if mounted else root

    def peers(self, sockets: tuple[Socket, ...], table: SocketTable) -> dict[int, int]:
        """Return the other end (inode) of each local connection that may be storage, keyed by the
        inode of the process's end."""
        peer_ends = {}
        self.has_unknown_peers = False
        for socket in sockets:
            if socket.role == "other":
                continue
            peer = self._peers.get(socket.inode)
            is_local = socket.family == "unix"
            connection = self._connections.get(socket.inode)
            if socket.family == "tcp" and connection is not None:
                try:
                    peer = table.tcp_peer(connection.id)
                except Unreadable:
                    is_local = True  # The other end may be local.
            if peer:
                peer_ends[socket.inode] = peer
            elif is_local:
                self.has_unknown_peers = True
        return peer_ends

    def close(self) -> None:
        self._protocols, self._connections, self._graph = None, {}, None
        self._settled = None

    def _protocol(self, descriptor: str) -> str:
        """Return the protocol of a socket; "" if it is irrelevant or the socket was closed.

        The kernel answers from memory. Raises OSError.
        """
        try:
            path = f"{self._proc}/{self._pid}/fd/{descriptor}"
            name = (
                os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode("ascii", "replace")
            )
        except OSError as error:
            # The socket was closed, or the descriptor was reused.
            if error.errno in (errno.ENOENT, errno.ENODATA, errno.EOPNOTSUPP):
                return ""
            raise
        return name if name in _UNIX | _TCP | _UNSEEN else ""

    def _tcp(self, inode: int, table: SocketTable) -> Socket | None:
        """Raises Unreadable."""
        is_known = inode in self._connections
        connection = self._connections.get(inode)
        if is_known and connection is None:
            return None
        tcp = table.tcp(inode, connection.id if connection else b"")
        if connection is None:
            connection = None if tcp is None else _StreamSocket(tcp.id, not tcp.listened)
            self._connections[inode] = connection
        if tcp is None or connection is None:
            return None
        if not connection.client:
            self.accepted.append(inode)
        local, remote = sockdiag.ports_of(connection.id)
        use = self._tcp_use(inode, remote if connection.client else local)
        return Socket(
            inode=inode,
            family="tcp",
            client=connection.client,
            role=use.role,
            node=use.node,
            send_queue=tcp.send_queue,
            receive_queue=tcp.receive_queue,
            unacked=tcp.unacked,
            acked=tcp.acked,
            received=tcp.received,
            accepted=not connection.client,
            tcp_id=connection.id.hex() if use.role == "storage" else "",
        )

    def _unix(self, inode: int, table: SocketTable) -> Socket | None:
        """Raises Unreadable."""
        unix = table.unix(inode)
        if unix is None or unix.shut:
            return None
        # The other end is invisible if a hanging server has not accepted the connection yet, or if
        # the server is in another network namespace. In both cases, this is not a socketpair(2).
        peer = table.unix(unix.peer)
        self._peers[inode] = unix.peer
        if unix.name:
            self.accepted.append(inode)
        use = self._unix_use(inode, unix.name or (peer.name if peer is not None else b""), table)
        return Socket(
            inode=inode,
            family="unix",
            client=not unix.name and (peer is None or bool(peer.name)),
            send_queue=unix.send_queue,
            receive_queue=unix.receive_queue,
            role=use.role,
            node=use.node,
            accepted=self._listens_at(unix.name, table),
        )

    def _listens_at(self, name: bytes, table: SocketTable) -> bool:
        """Return whether the process listens on a unix socket of this name. Raises Unreadable."""
        if not name:
            return False
        if self._own_names is None:
            own = [i for i, protocol in (self._protocols or {}).items() if protocol in _UNIX]
            self._own_names = {table.listens_at(inode) for inode in own}
        return name in self._own_names

    def _unix_use(self, inode: int, name: bytes, table: SocketTable) -> _Use:
        ends, number = self._ends, self._numbers.get(inode)
        unnamed = _OTHER if number in _STANDARD else _UNKNOWN
        if ends is None:
            return _OTHER if _SERVICES.match(name) else unnamed
        if number in ends.descriptors:
            return ends.descriptors[number]
        if name and ends.descriptors:
            if self._given_names is None:
                given = [(i, n) for i, n in self._numbers.items() if n in ends.descriptors]
                self._given_names = {table.listens_at(i): ends.descriptors[n] for i, n in given}
            if name in self._given_names:
                return self._given_names[name]
        use = ends.at_path(os.fsdecode(name.removeprefix(b"\0")))
        return unnamed if use is _UNKNOWN else use

    def _tcp_use(self, inode: int, port: int) -> _Use:
        """Return the purpose of a TCP connection. `port`: the port of the listening end."""
        ends, number = self._ends, self._numbers.get(inode)
        unnamed = _OTHER if number in _STANDARD else _UNKNOWN
        if ends is None:
            return unnamed
        uses = [use for use in (ends.ports.get(port), ends.descriptors.get(number)) if use]
        # Prefer storage: the same port may belong to storage on one host, and to something else on
        # another host.
        return max(uses, key=lambda use: use.role == "storage", default=unnamed)

    def _read_foreign(
        self, protocols: Mapping[int, str], table: SocketTable
    ) -> tuple[Socket, ...] | None:
        """Read the sockets of a process in another network namespace from /proc/PID/net. These
        files show neither the other end of a unix socket nor the bytes sent over TCP.

        Return None if a file that may list one of its sockets is unreadable or longer than
        MAX_BYTES.
        """
        net = f"{self._proc}/{self._pid}/net"
        unix = read_bounded(f"{net}/unix", MAX_BYTES)
        tcp = read_bounded(f"{net}/tcp", MAX_BYTES)
        tcp6 = read_bounded(f"{net}/tcp6", MAX_BYTES)
        if unix is None or tcp is None:
            return None
        if tcp6 is None:
            # A kernel without IPv6 has neither the file tcp6 nor TCPv6 sockets.
            if "TCPv6" in protocols.values():
                return None
            tcp6 = b""
        tcp += tcp6
        inodes = frozenset(protocols)
        self._peers, self._given_names = {}, None
        self.accepted = []
        try:
            # Both ends of a unix connection belong to the network namespace of the client, so
            # connections from clients in our namespace are in our table.
            by_inode = {inode: self._unix(inode, table) for inode in sorted(inodes)}
            elsewhere = frozenset(inode for inode in inodes if not table.has_unix(inode))
            sockets = [socket for socket in by_inode.values() if socket is not None]
            rows = [row for line in unix.split(b"\n") if (row := parse_unix_row(line))]
            unix_inodes = frozenset(one for one in elsewhere if protocols[one] in _UNIX)
            sockets += self._foreign_unix(rows, unix_inodes, table)
            sockets += self._foreign_tcp(tcp, elsewhere)
            self._in_its_namespace = {row.inode for row in rows}
        except (ValueError, IndexError, Unreadable) as error:
            note_once("reading sockets", error)
            return None
        return tuple(sorted(sockets, key=lambda socket: socket.inode))

    def _foreign_unix(
        self, rows: Sequence[UnixRow], inodes: frozenset[int], table: SocketTable
    ) -> Iterator[Socket]:
        """For a process in another network namespace: yield its unix sockets that are not in our
        namespace's table.

        The rows do not show which two sockets are connected with each other, and only an accepted
        socket has a path. So each connection that the process has made gets its purpose from the
        path of an accepted socket of another process. Raises Unreadable if these connections and
        sockets differ in number, or if a socket has two rows.
        """
        own = [row.inode for row in rows if row.inode in inodes]
        if len(own) > len(set(own)):
            raise Unreadable("unix sockets in another network namespace: a row is forged")
        made = 0
        own_paths = {row.name for row in rows if row.listening and row.inode in inodes}
        ends: list[tuple[int, _Use]] = []
        for row in rows:
            if not (row.stream and row.connected):
                continue
            inode, path = row.inode, row.name
            use = self._unix_use(inode, path, table)
            if inode not in inodes:
                ends += [(inode, use)] if path else []
            elif path or use is not _UNKNOWN:
                self.accepted += [inode] if path else []
                yield _queueless(inode, use, client=not path, accepted=path in own_paths)
            else:
                made += 1
        known_ends = [end for end in ends if end[1] is not _UNKNOWN] if made else []
        unnamed = [end for end in ends if end[1] is _UNKNOWN] if made > len(known_ends) else []
        if made > len(known_ends) and made - len(known_ends) != len(unnamed):
            raise Unreadable("unix sockets in another network namespace")
        for inode, use in (*known_ends, *unnamed):
            self._peers[inode] = inode
            yield _queueless(inode, use, client=True)

    def _foreign_tcp(self, text: bytes, inodes: frozenset[int]) -> Iterator[Socket]:
        """Parse lines of the form: sl local remote st tx:rx … inode (the tenth field). Raises
        ValueError, IndexError."""
        rows = [line.split(maxsplit=10) for line in text.splitlines() if b": " in line]
        listening = {row[1].rpartition(b":")[2] for row in rows if row[3] == _LISTEN}
        established = [row for row in rows if row[3] == _ESTABLISHED]
        ends = {(row[2], row[1]): int(row[9]) for row in established}
        for row in established:
            if (inode := int(row[9])) not in inodes:
                continue
            local, remote = (address.rpartition(b":")[2] for address in row[1:3])
            client = local not in listening
            use = self._tcp_use(inode, int(remote if client else local, 16))
            send, _, receive = row[4].partition(b":")
            self._peers[inode] = ends.get((row[1], row[2]), 0)
            if not client:
                self.accepted.append(inode)
            yield Socket(
                inode=inode,
                family="tcp",
                client=client,
                role=use.role,
                node=use.node,
                send_queue=int(send, 16),
                receive_queue=int(receive, 16),
                accepted=not client,
            )


def _queueless(inode: int, use: _Use, *, client: bool, accepted: bool = False) -> Socket:
    return Socket(
        inode=inode,
        family="unix",
        client=client,
        role=use.role,
        node=use.node,
        send_queue=0,
        receive_queue=0,
        accepted=accepted,
    )


def _use_of(node: Node | None) -> _Use:
    return _OTHER if node is None else _Use("storage", node.name)


class _Ends:
    """The purposes of the endpoints on a command line, for quick look-up: there may be thousands of
    connections, and thousands of endpoints."""

    def __init__(self, graph: BlockGraph) -> None:
        self.descriptors: dict[int | None, _Use] = {}
        self.ports: dict[int, _Use] = {}
        self._paths: dict[str, _Use] = {}
        self._names: dict[str, _Use] = {}
        self._relative: dict[str, _Use] = {}
        for end, node in graph.endpoints.items():
            use = _use_of(node)
            if end.descriptor is not None:
                self.descriptors.setdefault(end.descriptor, use)
            if end.port is not None and self.ports.get(end.port, _OTHER).role != "storage":
                self.ports[end.port] = use
            if path := without_link(end.path):
                base = os.path.basename(path)  # noqa: PTH119
                self._paths.setdefault(path, use)
                self._names.setdefault(base, use)
                if not path.startswith("/"):
                    self._relative.setdefault(base, use)

    def at_path(self, kernels: str) -> _Use:
        """Return the purpose of the connection with this path, compared as in `_listens_at`."""
        if not (kernels := without_link(kernels)):
            return _UNKNOWN
        if kernels in self._paths:
            return self._paths[kernels]
        names = self._relative if kernels.startswith("/") else self._names
        return names.get(os.path.basename(kernels), _UNKNOWN)  # noqa: PTH119


_NO_ENDS: Final = _Ends(BlockGraph())


def _ends_of(graph: BlockGraph) -> _Ends:
    return _Ends(graph) if graph.endpoints else _NO_ENDS


def _any(answers: Set[bool | None] | None) -> bool | None:
    """Return whether any answer is True; None if this is unknown, or if there are no answers."""
    if not answers or (None in answers and True not in answers):
        return None
    return True in answers


def _listens_at(given: str, kernels: bytes) -> bool:
    """Compare a path from a command line with one that a server passed to bind(2)."""
    bound, given = without_link(os.fsdecode(kernels)), without_link(given)
    if bound.startswith("/") and given.startswith("/"):
        return bound == given
    return os.path.basename(bound) == os.path.basename(given)  # noqa: PTH119
