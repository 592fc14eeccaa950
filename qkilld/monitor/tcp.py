"""Connect to a monitor on TCP or an abstract socket, and prove in which process the connection
ends.

Both kinds of socket belong to a network namespace, and only a program in the guest's namespace can
connect. The daemon usually has another namespace, so it gets the connection from its caller, and
repeats the proof.

For TCP, the kernel does not report the peer's process. But within a network namespace, only the
peer's socket has the same two addresses in reverse order. The kernel's table shows the inode of the
peer's socket, and the process must have a descriptor with this inode. The same table must also
contain our own socket. The inode of our socket is unique on the host, so this rules out a
connection with the same addresses in another namespace.

All functions may block. `connect_in_netns` also changes the network namespace of the calling
thread, so run it in a separate thread. Sources: proc_pid_net(5), unix(7), setns(2).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.foreign_descriptors import take_over
from qkilld.model.errors import MonitorBusy, MonitorError, MonitorUnreachable
from qkilld.model.named_tuple import NamedTuple
from qkilld.monitor.endpoints import WILDCARDS, Endpoint, TcpListener, abstract_address

CONNECT_S: Final = 1.0
ACCEPT_S: Final = 1.0
"""How long to wait until QEMU accepts a connection, which usually takes a millisecond. Before that,
the other end has no inode, so nothing proves to which process it belongs."""
MAX_TABLE: Final = 64 << 20
"""A /proc/PID/net/tcp that is longer than this (about 400,000 sockets) counts as unreadable."""
MAX_DESCRIPTORS: Final = 65_536

_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred
_CLONE_NEWNET: Final = 0x40000000
_ESTABLISHED, _LISTENING = b"01", b"0A"  # include/net/tcp_states.h
_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4-mapped IPv6 address."""


class TcpAddress(NamedTuple):
    host: str
    port: int


class TableEntry(NamedTuple):
    """A socket in the kernel's table."""

    local: TcpAddress
    remote: TcpAddress
    listening: bool
    inode: int
    """The inode of the socket; 0 until the connection is accepted."""


def socket_descriptors(pid: int, proc: Path = procfs.PROC) -> dict[int, set[int]]:
    """Return the descriptors of each socket of the process, by the socket's inode. Raises
    OSError."""
    directory = os.open(f"{proc}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        links = procfs.read_links(directory, MAX_DESCRIPTORS)
    finally:
        os.close(directory)
    if links is None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    descriptors: dict[int, set[int]] = {}
    for number, link in links:
        if match := _SOCKET.fullmatch(link):
            descriptors.setdefault(int(match[1]), set()).add(int(number))
    return descriptors


def read_tcp_listeners(
    pid: int, descriptors: Mapping[int, set[int]], proc: Path = procfs.PROC
) -> list[TcpListener]:
    """Return the TCP listeners among the process's sockets (`descriptors`). Raises OSError."""
    sockets = [each for each in read_tcp(pid, proc) if each.inode in descriptors]
    used = {each.local.port for each in sockets if not each.listening}
    return [
        TcpListener(
            each.inode, *each.local, frozenset(descriptors[each.inode]), each.local.port in used
        )
        for each in sockets
        if each.listening
    ]


def read_tcp(pid: int, proc: Path = procfs.PROC) -> Iterator[TableEntry]:
    """Yield the listening and connected sockets of the process's network namespace. Raises
    OSError."""
    for name in ("tcp", "tcp6"):
        try:
            file = (proc / str(pid) / "net" / name).open("rb")
        except FileNotFoundError:
            continue  # The kernel has no IPv6, or the process is gone.
        with file:
            size = 0
            next(file, None)
            for line in file:
                if (size := size + len(line)) > MAX_TABLE:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
                # The fields: sl local remote st tx:rx tr:when retrnsmt uid timeout inode
                fields = line.split(maxsplit=10)
                if len(fields) > 9 and fields[3] in (_ESTABLISHED, _LISTENING):
                    yield TableEntry(
                        _parse_address(fields[1]),
                        _parse_address(fields[2]),
                        fields[3] == _LISTENING,
                        int(fields[9]),
                    )


def peer_of(connection: socket.socket) -> int:
    """Return the pid of the process at the other end of a unix socket. Raises OSError."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid


def ends_in(connection: socket.socket, pid: int, proc: Path = procfs.PROC) -> bool:
    """Return whether the other end of the connection belongs to the process. Raises OSError."""
    if connection.family == socket.AF_UNIX:
        return peer_of(connection) == pid
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    ours, theirs = _address(connection.getsockname()), _address(connection.getpeername())
    inodes = {
        each.local: each.inode
        for each in read_tcp(pid, proc)
        if not each.listening and (each.local, each.remote) in ((ours, theirs), (theirs, ours))
    }
    own = os.fstat(connection.fileno()).st_ino
    return (
        ours != theirs
        and inodes.get(ours) == own
        and inodes.get(theirs, 0) in socket_descriptors(pid, proc)
    )


def peer_address(connection: socket.socket) -> object:
    """Return the peer's address for `endpoints.endpoint_of_peer`. Raises OSError."""
    address = connection.getpeername()
    return address if connection.family == socket.AF_UNIX else _address(address)


def needs_netns(endpoint: Endpoint) -> bool:
    """Return whether the socket has no path. If so, only `connect_in_netns` reaches it."""
    listener = endpoint.listener
    return isinstance(listener, TcpListener) or all(path.startswith("@") for path in listener.paths)


def connect_in_netns(pid: int, endpoint: Endpoint, proc: Path = procfs.PROC) -> socket.socket:
    """Connect to a monitor on TCP or an abstract socket, from the process's network namespace, and
    prove that the other end belongs to the process. Send nothing.

    Raises MonitorBusy, MonitorUnreachable.
    """
    if endpoint.listener.in_use:
        raise MonitorBusy(f"Another program uses {endpoint.title}")
    try:
        _enter(pid, proc)
        connection = _connect(endpoint)
    except OSError as error:
        raise _unreachable(endpoint, error) from None
    try:
        _prove(connection, pid, endpoint, proc)
    except OSError as error:
        connection.close()
        raise _unreachable(endpoint, error) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(endpoint: Endpoint) -> socket.socket:
    listener = endpoint.listener
    address: bytes | tuple[str, int]
    if isinstance(listener, TcpListener):
        family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
        address = WILDCARDS.get(listener.host, listener.host), listener.port
    else:
        family = socket.AF_UNIX
        address = abstract_address(listener.paths[0])
    connection = take_over(socket.socket(family, socket.SOCK_STREAM))
    try:
        connection.settimeout(CONNECT_S)
        connection.connect(address)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


def _prove(connection: socket.socket, pid: int, endpoint: Endpoint, proc: Path) -> None:
    """Prove that the other end belongs to the process. Raises MonitorBusy, MonitorUnreachable,
    OSError."""
    until = time.monotonic() + ACCEPT_S
    while not ends_in(connection, pid, proc):
        if connection.family == socket.AF_UNIX:
            raise MonitorUnreachable(f"Another process listens at {endpoint.title}")
        if time.monotonic() >= until:
            raise MonitorBusy(f"QEMU does not accept a connection to {endpoint.title}")
        time.sleep(0.01)


def _enter(pid: int, proc: Path) -> None:
    """Move this thread into the process's network namespace. Raises OSError."""
    with (proc / str(pid) / "ns/net").open("rb") as namespace:
        own = Path("/proc/thread-self/ns/net").stat()
        if os.path.samestat(os.fstat(namespace.fileno()), own):
            return
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _address(address: tuple[str, int]) -> TcpAddress:
    """Return the address as `read_tcp` does: an IPv4 address is not mapped to IPv6."""
    host, port = address[:2]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return TcpAddress(_text(socket.inet_pton(family, host.partition("%")[0])), port)


def _parse_address(text: bytes) -> TcpAddress:
    """Parse an address such as 0100007F:115C: 32-bit words in the machine's byte order, then the
    port."""
    host, _, port = text.partition(b":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return TcpAddress(_text(packed), int(port, 16))


def _text(packed: bytes) -> str:
    packed = packed.removeprefix(_MAPPED) if len(packed) == 16 else packed
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _unreachable(endpoint: Endpoint, error: OSError) -> MonitorError:
    return MonitorUnreachable(
        f"qkilld cannot connect to {endpoint.title}: {os.strerror(error.errno or 0)}"
    )
