"""The connections of a process: which of its sockets are connected, and what is in their queues.

The descriptors tell the inodes (files.py) and the kernel, asked once for all processes
(sockdiag.py), what they are. A process in another network namespace is not in that answer: of its
TCP sockets /proc/PID/net tells the queues, of its unix ones nothing that would help.

Needs the ptrace right for another user's process. Cost: see the methods. Sources: sock_diag(7),
proc_pid_net(5), unix(7).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.evidence import files, sockdiag
from qkilld.adapters.evidence.files import Descriptors
from qkilld.adapters.evidence.mountinfo import read_bounded
from qkilld.adapters.evidence.sockdiag import SocketTable, Unreadable
from qkilld.model.evidence import Socket

__all__ = ["SocketReader", "SocketTable"]

PROC: Final = Path("/proc")
MAX_BYTES: Final = 4 << 20
"""Of a file of /proc/PID/net, some 28,000 sockets. What is longer counts as not to be read."""

# As /proc/net/protocols names them; stream sockets of unix apart from the others since Linux 5.15.
_UNIX: Final = frozenset({"UNIX", "UNIX-STREAM"})
_TCP: Final = frozenset({"TCP", "TCPv6"})
_UNSEEN: Final = frozenset({"MPTCP", "MPTCPv6", "SCTP", "SCTPv6", "SMC", "SMC6", "AF_VSOCK"})

_ESTABLISHED: Final = b"01"
_LISTEN: Final = b"0A"
_STREAM: Final = b"0001"
_CONNECTED: Final = b"03"


class _Connection(NamedTuple):
    id: bytes
    client: bool


class SocketReader:
    """The connected stream sockets of one process. For one thread at a time; holds nothing open."""

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self._pid, self._proc = pid, proc
        self._protocols: dict[int, str] | None = None
        self._connections: dict[int, _Connection | None] = {}
        self._foreign = False

    def refresh(self, descriptors: Descriptors | None = None) -> None:
        """Look anew which sockets it has. Never raises.

        `descriptors`: of a read just made (files.read_descriptors), to save reading them again.
        Costs 20 µs with it and 4 µs a descriptor more without; 3 µs for each new socket.
        """
        if descriptors is None:
            descriptors = files.read_descriptors(self._pid, self._proc)
        known, self._protocols = self._protocols or {}, None
        if descriptors is None or descriptors.too_many:
            return
        try:
            ours = Path(f"{self._proc}/{sockdiag.namespace_of}/ns/net").readlink()
            its = Path(f"{self._proc}/{self._pid}/ns/net").readlink()
            found = {i: known.get(i) or self._protocol(n) for n, i in descriptors.sockets}
        except OSError:
            return
        self._foreign = ours != its
        self._protocols = {inode: protocol for inode, protocol in found.items() if protocol}
        # One that was not connected may be by now.
        self._connections = {
            inode: connection
            for inode, connection in self._connections.items()
            if connection is not None and inode in self._protocols
        }

    def read(self, table: SocketTable) -> tuple[Socket, ...] | None:
        """What is in their queues, by inode. None where it is unknown: refresh() did not come
        through, the kernel does not tell, it has a connection of a kind that is not looked into
        (vsock, MPTCP, SCTP, SMC), or (in another network namespace) a unix socket that may be a
        client's.

        TCP that is established and unix that is connected; what the other end has closed is left
        out. A client is, on unix, one that has no name while its other end has one; on TCP one
        whose local port nobody listened on when it was seen first. Costs 5 µs a socket beside the
        table's own, and 20 µs for one of TCP.
        """
        protocols = self._protocols
        if protocols is None or not _UNSEEN.isdisjoint(protocols.values()):
            return None
        if self._foreign and protocols:
            return self._read_foreign(frozenset(protocols))
        found = []
        try:
            for inode in sorted(protocols):
                read = self._tcp if protocols[inode] in _TCP else _unix
                if (socket := read(inode, table)) is not None:
                    found.append(socket)
        except Unreadable:
            return None
        return tuple(found)

    def close(self) -> None:
        """Forget everything."""
        self._protocols, self._connections = None, {}

    def _protocol(self, descriptor: str) -> str:
        """Of a socket, as the kernel names it; "" where it is of no use here, or closed by now.

        This asks the open socket, which is in memory. Raises OSError.
        """
        try:
            path = f"{self._proc}/{self._pid}/fd/{descriptor}"
            name = (
                os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode("ascii", "replace")
            )
        except OSError as error:
            # By now it is closed, or another file.
            if error.errno in (errno.ENOENT, errno.ENODATA, errno.EOPNOTSUPP):
                return ""
            raise
        return name if name in _UNIX | _TCP | _UNSEEN else ""

    def _tcp(self, inode: int, table: SocketTable) -> Socket | None:
        """Raises Unreadable."""
        known = inode in self._connections
        connection = self._connections.get(inode)
        if known and connection is None:
            return None
        tcp = table.tcp(inode, connection.id if connection else b"")
        if connection is None:
            connection = None if tcp is None else _Connection(tcp.id, not tcp.listened)
            self._connections[inode] = connection
        if tcp is None or connection is None:
            return None
        return Socket(
            inode=inode,
            family="tcp",
            client=connection.client,
            send_queue=tcp.send_queue,
            receive_queue=tcp.receive_queue,
            unacked=tcp.unacked,
            acked=tcp.acked,
            received=tcp.received,
        )

    def _read_foreign(self, inodes: frozenset[int]) -> tuple[Socket, ...] | None:
        """By /proc/PID/net: accepted unix sockets are left out, TCP has its queues alone."""
        net = f"{self._proc}/{self._pid}/net"
        unix = read_bounded(f"{net}/unix", MAX_BYTES)
        tcp = read_bounded(f"{net}/tcp", MAX_BYTES)
        if unix is None or tcp is None:
            return None
        # Without IPv6 there is no such file.
        tcp += read_bounded(f"{net}/tcp6", MAX_BYTES) or b""
        try:
            return None if _has_unix_client(unix, inodes) else _tcp_of(tcp, inodes)
        except (ValueError, IndexError):
            return None


def _unix(inode: int, table: SocketTable) -> Socket | None:
    """Raises Unreadable."""
    unix = table.unix(inode)
    if unix is None or unix.shut:
        return None
    # An end that is not to be seen was not yet accepted (a server that stands still), or is in
    # another network namespace: it is no half of a pair either way.
    peer = table.unix(unix.peer)
    return Socket(
        inode=inode,
        family="unix",
        client=not unix.named and (peer is None or peer.named),
        send_queue=unix.send_queue,
        receive_queue=unix.receive_queue,
    )


def _has_unix_client(text: bytes, inodes: frozenset[int]) -> bool:
    """Lines: Num RefCount Protocol Flags Type St Inode [Path]. Raises ValueError, IndexError."""
    for line in text.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        unnamed = len(fields) == 7 and fields[4:6] == [_STREAM, _CONNECTED]
        if unnamed and int(fields[6]) in inodes:
            return True
    return False


def _tcp_of(text: bytes, inodes: frozenset[int]) -> tuple[Socket, ...]:
    """Lines: sl local remote st tx:rx … inode (the tenth). Raises ValueError, IndexError."""
    rows = [line.split(maxsplit=10) for line in text.splitlines() if b": " in line]
    listening = {row[1].rpartition(b":")[2] for row in rows if row[3] == _LISTEN}
    found = []
    for row in rows:
        if row[3] != _ESTABLISHED or (inode := int(row[9])) not in inodes:
            continue
        send, _, receive = row[4].partition(b":")
        client = row[1].rpartition(b":")[2] not in listening
        found.append(Socket(inode, "tcp", client, int(send, 16), int(receive, 16)))
    return tuple(sorted(found, key=lambda socket: socket.inode))
