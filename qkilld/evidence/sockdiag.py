"""Read all stream sockets of a network namespace at once, by sock_diag(7).

pyroute2 (0.9.7) is not used: importing it takes 25 MB of memory, more than the rest of the daemon,
and reading a socket with it takes 60 µs (measured). 1,000 guests have thousands of sockets.

Any user can have hundreds of thousands of sockets. If a family (unix or TCP) has more than
MAX_SOCKETS, its table is called crowded, and sockets are queried one by one. A query for a TCP
socket needs its id; one scan of the table finds the ids of all wanted sockets.

Needs no rights. Cost: 30 µs for the unix table, and 2 µs for each socket in it; 600 µs for the TCP
table, which has many slots, and 20 µs for one TCP socket whose id is known. The kernel finds one
unix socket in 1 ms among 40,000, and in 40 ms among 200,000. Sources: sock_diag(7), netlink(7),
linux/unix_diag.h, linux/inet_diag.h, linux/tcp.h.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from qkilld.debug_log import note_once
from qkilld.model.named_tuple import NamedTuple

MAX_SOCKETS: Final = 32_768
"""At most this many sockets of one family are read with one request."""
CROWDED_S: Final = 30.0
"""How long a table counts as crowded after it was found to have too many sockets."""
SINGLE_S: Final = 2.0
"""How long a SocketTable may query single sockets of crowded tables in total."""
_CHEAPER: Final = 32
"""Up to this many queries for single TCP sockets are cheaper than reading the whole table."""

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_ONE: Final = 0x001  # NLM_F_REQUEST
_DUMP: Final = 0x301  # With NLM_F_DUMP.
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_RECEIVE_BYTES: Final = 1 << 16
_TIMEOUT: Final = struct.pack("@ll", 2, 0)
"""Receive timeout, in s and µs. Normally, the kernel answers at once."""

_NO_COOKIE: Final = 0xFFFF_FFFF
_ESTABLISHED: Final = 1
_LISTEN: Final = 10
_CLOSED_FIRST: Final = (4, 5, 6, 11)  # FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSING
_SOCK_STREAM: Final = 1

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # rtattr: length, type
_U32: Final = struct.Struct("=I")
_U32_U32: Final = struct.Struct("=II")
_U64_U64: Final = struct.Struct("=QQ")
_PORT: Final = struct.Struct("!H")

# struct unix_diag_req: family, protocol, pad, states, inode, show, cookie (u32 × 2)
_UNIX_REQUEST: Final = struct.Struct("=BBHIIIII")
_UNIX_SHOW: Final = 0x01 | 0x04 | 0x10  # name, peer, queues
_UNIX_MESSAGE: Final = struct.Struct("=BBBxI8x")  # family, type, state, inode, cookie
_UNIX_NAME, _UNIX_VFS, _UNIX_PEER, _UNIX_QUEUES, _UNIX_SHUTDOWN = 0, 1, 2, 4, 6
_UNIX_SHOW_NAME, _UNIX_SHOW_VFS = 0x01, 0x02
_RECEIVE_SHUT: Final = 1  # RCV_SHUTDOWN, net/sock.h

# struct inet_diag_req_v2: family, protocol, extensions, pad, states, socket id (48 bytes)
_TCP_REQUEST: Final = struct.Struct("=BBBxI48s")
_TCP_MESSAGE_BYTES: Final = 72
# struct inet_diag_msg: family at 0, state at 1, socket id at 4 (local port first), receive and send
# queue at 56, inode at 68
_TCP_INFO: Final = 2
_TCP_SHOW: Final = 1 << (_TCP_INFO - 1)
_INFO_UNACKED, _INFO_BYTES_ACKED = 24, 120  # Offsets in struct tcp_info.

_MALFORMED: Final = (ValueError, IndexError, struct.error)
"""Errors for a message that violates linux/*_diag.h."""
_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4-mapped IPv6 address."""

_Place = tuple[bytes, int, int]
"""(buffer, start, end) of a message body."""


namespace_of = "self"
"""The name under /proc of the process whose network namespace is read."""
_netlink: socket.socket | None = None
_netlink_lock: Final = threading.Lock()


def ask_through(fd: int) -> None:
    """Query the network namespace of the process that opened this netlink socket, because our own
    may be empty (PrivateNetwork= in qkilld.service). Takes ownership of the descriptor.

    If the descriptor is not such a socket, closes it and raises ValueError.
    """
    global _netlink, namespace_of
    kernel = socket.socket(fileno=fd)
    if kernel.family != socket.AF_NETLINK or kernel.proto != _NETLINK_SOCK_DIAG:
        kernel.close()
        raise ValueError("the descriptor is not a netlink socket for sock_diag")
    kernel.setblocking(True)
    _netlink, namespace_of = kernel, "1"


class Unreadable(Exception):
    """Sockets cannot be read."""


class _TooMany(ValueError):
    """The table has more than MAX_SOCKETS, or reading it takes too long."""


class CrowdedTables:
    """The tables that any SocketTable has recently found crowded. Thread-safe."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def note(self, family: int) -> None:
        note_once("asking the kernel for sockets", f"there are more than {MAX_SOCKETS}")
        self._until[family] = time.monotonic() + CROWDED_S

    def __contains__(self, family: int) -> bool:
        return time.monotonic() < self._until.get(family, 0.0)


class UnixSocket(NamedTuple):
    """A connected unix socket. Queue sizes are in bytes as unix_diag reports them: the send queue
    includes the kernel's overhead."""

    name: bytes
    """The path that the socket is bound to; b"" for none. An abstract path begins with a zero byte.
    An accepted socket has the path of the listening socket."""
    peer: int
    """The inode of the other end; 0 if it is closed, or has not accepted the connection yet."""
    shut: bool
    """Nothing can be received, so the process does not wait for a reply. Either the other end is
    closed, or this end is shut down for reading, like the end that a service uses to write to the
    journal (systemd: src/core/execute.c, connect_logger_as)."""
    send_queue: int
    receive_queue: int


class TcpSocket(NamedTuple):
    """An established TCP connection."""

    id: bytes
    """The kernel's id, for SocketTable.tcp and tcp_peer: family, then struct inet_diag_sockid."""
    listened: bool
    """A process listens on the local port, so this connection was accepted. A query by id checks
    this only if the table is crowded, and otherwise leaves it False."""
    send_queue: int
    """Bytes not yet acknowledged, whether sent or not."""
    receive_queue: int
    unacked: int | None
    acked: int | None
    received: int | None


class SocketTable:
    """The connected stream sockets of our network namespace, as of the first query.

    Create one for each round of samples, and share it between readers in any threads. No descriptor
    stays open. All methods raise Unreadable if the kernel fails, or takes too long because there
    are too many sockets. After a failure, only single sockets of crowded tables remain readable.
    """

    def __init__(self, crowded: CrowdedTables | None = None) -> None:
        self._crowded = crowded or CrowdedTables()
        self._lock = threading.Lock()
        self._singles: dict[int, _Place | None] = {}
        self._query_time = 0.0
        """The time (s) spent on single sockets. After SINGLE_S, no more of them are read."""
        self._expected: set[int] = set()
        self._tcp_infos: dict[int, bytes] = {}
        self._searched_inodes: set[int] = set()
        self._unix: dict[int, _Place] | None = None
        self._listening: dict[int, _Place] = {}
        self._tcp: tuple[dict[int, _Place], set[int]] | None = None
        self._by_address: dict[bytes, int] | None = None
        self._query_count = 0
        self._failure = ""

    def unix(self, inode: int) -> UnixSocket | None:
        """Return the connected unix stream socket with this inode, if there is one."""
        if self._reads_unix():
            place = (self._unix or {}).get(inode)
        else:
            place = self._single_unix(inode, _ESTABLISHED)
        with _checked():
            return None if place is None else _unix(*place)

    def listens_at(self, inode: int) -> bytes:
        """Return the name of a listening unix socket; b"" if the socket does not listen."""
        place = self._listener(inode)
        with _checked():
            return b"" if place is None else _unix(*place).name

    def has_unix(self, inode: int) -> bool:
        """Return whether a listening or connected unix socket of our namespace has this inode."""
        return self.unix(inode) is not None or self._listener(inode) is not None

    def is_listening(self, inode: int) -> bool:
        return self._listener(inode) is not None

    def listens(self, matches: Callable[[bytes], bool]) -> bool:
        """Return whether any listening unix socket has a matching name."""
        if self._reads_unix():
            with _checked():
                return any(matches(_unix(*place).name) for place in self._listening.values())
        request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << _LISTEN, 0, _UNIX_SHOW_NAME, 0, 0)
        with self._single():
            places = _request(request, _DUMP, seconds=SINGLE_S)
            return any(matches(_unix(*place).name) for place in places)

    def listens_on(self, port: int) -> bool:
        """Return whether a TCP socket listens on this port."""
        if (tables := self._reads_tcp()) is not None:
            return port in tables[1]
        with self._single():
            return _listens_on(port)

    def expect_tcp(self, inodes: Iterable[int]) -> None:
        """Announce the inodes for which tcp() will be called without an id: one scan finds all
        ids."""
        self._expected.update(inodes)

    def tcp(self, inode: int, id: bytes = b"") -> TcpSocket | None:
        """Return the established TCP socket with this inode, if there is one.

        With `id` (the TcpSocket.id of an earlier result), the kernel finds the socket at once.
        Without it, the kernel scans its whole table, which takes long even with few sockets.
        """
        if self._tcp is None and id:
            with self._lock, self._query():
                if self._tcp is None and self._query_count < _CHEAPER:
                    self._query_count += 1
                    return _ask_tcp(inode, id)
        if (tables := self._reads_tcp()) is None:
            with self._single():
                id = id or self._id_of(inode)
                return _ask_tcp(inode, id, alone=True) if id else None
        sockets, listeners = tables
        place = sockets.get(inode)
        with _checked():
            return None if place is None else _tcp(*place, listeners)

    def tcp_peer(self, id: bytes) -> int | None:
        """Return the inode of the other end, if it is in our network namespace, too."""
        if (tables := self._reads_tcp()) is None:
            with self._single():
                return _ask_peer(id)
        with _checked():
            if self._by_address is None:
                self._by_address = {_address(b, s): inode for inode, (b, s, _) in tables[0].items()}
            return self._by_address.get(_mirrored(id))

    def _reads_unix(self) -> bool:
        """Read the whole unix table once; return False if it is crowded."""
        if self._unix is None and socket.AF_UNIX not in self._crowded:
            with self._lock, self._query():
                if self._unix is None and socket.AF_UNIX not in self._crowded:
                    try:
                        self._unix, self._listening = _dump_unix()
                    except _TooMany:
                        self._crowded.note(socket.AF_UNIX)
        return self._unix is not None

    def _reads_tcp(self) -> tuple[dict[int, _Place], set[int]] | None:
        """Read the whole TCP table once; return None if it is crowded."""
        if self._tcp is None and socket.AF_INET not in self._crowded:
            with self._lock, self._query():
                if self._tcp is None and socket.AF_INET not in self._crowded:
                    try:
                        self._tcp = _dump_tcp()
                    except _TooMany:
                        self._crowded.note(socket.AF_INET)
        return self._tcp

    def _listener(self, inode: int) -> _Place | None:
        if self._reads_unix():
            return self._listening.get(inode)
        return self._single_unix(inode, _LISTEN)

    def _single_unix(self, inode: int, state: int) -> _Place | None:
        if inode not in self._singles:
            with self._single():
                self._singles[inode] = _ask_unix(inode)
        place = self._singles[inode]
        if place is None:
            return None
        with _checked():
            _, kind, reply_inode, _ = _UNIX_MESSAGE.unpack_from(place[0], place[1])
        return place if (kind, reply_inode) == (_SOCK_STREAM, state) else None

    def _id_of(self, inode: int) -> bytes:
        """Return the id of an established TCP socket in a crowded table; b"" if there is none."""
        if inode not in self._searched_inodes:
            with self._lock:
                if inode not in self._searched_inodes:
                    sought = {inode, *self._expected}
                    self._tcp_infos |= _find_tcp(sought)
                    self._searched_inodes |= sought
        return self._tcp_infos.get(inode, b"")

    @contextlib.contextmanager
    def _single(self) -> Iterator[None]:
        if self._query_time > SINGLE_S:
            raise Unreadable("there are too many sockets on this host")
        start = time.monotonic()
        try:
            yield
        except (OSError, *_MALFORMED) as error:
            note_once("asking the kernel for single sockets", error)
            raise Unreadable(str(error)) from None
        finally:
            self._query_time += time.monotonic() - start

    @contextlib.contextmanager
    def _query(self) -> Iterator[None]:
        if self._failure:
            raise Unreadable(self._failure)
        try:
            yield
        except (OSError, *_MALFORMED) as error:
            note_once("asking the kernel for sockets", error)
            self._failure = str(error)
            raise Unreadable(self._failure) from None


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Raise Unreadable if a message of the kernel cannot be parsed."""
    try:
        yield
    except _MALFORMED as error:
        raise Unreadable(str(error)) from None


def listening_unix() -> dict[tuple[int, int], int] | None:
    """Return the inodes of listening unix sockets, keyed by the files that they are bound to; None
    if unknown.

    The key is the device and the inode of the file. On btrfs and overlays, the device is the one in
    mountinfo, not `st_dev`. Only the lower 32 bits of the inode are reported.
    """
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << _LISTEN, 0, _UNIX_SHOW_VFS, 0, 0)
    inodes = {}
    try:
        for buffer, start, end in _request(request, _DUMP):
            _, _, _, inode = _UNIX_MESSAGE.unpack_from(buffer, start)
            for kind, at, _ in _attributes(buffer, start + _UNIX_MESSAGE.size, end):
                if kind == _UNIX_VFS:
                    file, device = _U32_U32.unpack_from(buffer, at)
                    inodes[os.makedev(device >> 20, device & 0xFFFFF), file] = inode
    except (OSError, *_MALFORMED) as error:
        note_once("asking the kernel for listening sockets", error)
        return None
    return inodes


def closed_first(id: bytes) -> bool | None:
    """Return whether this end of a former TCP connection (TcpSocket.id) was closed first; None if
    unknown. For a minute, the kernel keeps the end that was closed first (TIME_WAIT)."""
    socket_id = id[1:41] + struct.pack("=II", _NO_COOKIE, _NO_COOKIE)
    try:
        request = _TCP_REQUEST.pack(id[0], socket.IPPROTO_TCP, 0, 0, socket_id)
        for buffer, start, _ in _request(request, _ONE, lock_s=0.02):
            if buffer[start + 4 : start + 40] == id[1:37]:  # A listening socket differs.
                return buffer[start + 1] in _CLOSED_FIRST or None
    except FileNotFoundError:
        return False
    except (OSError, *_MALFORMED) as error:
        note_once("asking the kernel for a closed connection", error)
        return None
    return False


def ports_of(id: bytes) -> tuple[int, int]:
    """Return the local and remote port of a TcpSocket.id."""
    return _PORT.unpack_from(id, 1)[0], _PORT.unpack_from(id, 3)[0]


def _address(buffer: bytes, start: int) -> bytes:
    """Return the ports and addresses. IPv4 is mapped to IPv6, because perhaps only one end uses
    IPv6."""
    ports, source, target = (buffer[start + a : start + b] for a, b in ((4, 8), (8, 24), (24, 40)))
    if buffer[start] == socket.AF_INET:
        source, target = (_MAPPED + address[:4] for address in (source, target))
    return ports + source + target


def _mirrored(id: bytes) -> bytes:
    """Return the ports and addresses of a TcpSocket.id in the order of the other end."""
    here = _address(id[:1] + bytes(3) + id[1:], 0)
    return here[2:4] + here[:2] + here[20:36] + here[4:20]


def _dump_unix() -> tuple[dict[int, _Place], dict[int, _Place]]:
    """Return the connected sockets and the listening sockets."""
    states = 1 << _ESTABLISHED | 1 << _LISTEN
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, states, 0, _UNIX_SHOW, 0, 0)
    connected: dict[int, _Place] = {}
    listeners: dict[int, _Place] = {}
    for buffer, start, end in _request(request, _DUMP):
        _, kind, state, inode = _UNIX_MESSAGE.unpack_from(buffer, start)
        if kind == _SOCK_STREAM:
            sockets = listeners if state == _LISTEN else connected
            sockets[inode] = (buffer, start, end)
    return connected, listeners


def _dump_tcp() -> tuple[dict[int, _Place], set[int]]:
    """Return the established sockets, and the ports with listeners."""
    sockets, listeners = {}, set()
    for family in (socket.AF_INET, socket.AF_INET6):
        states = 1 << _ESTABLISHED | 1 << _LISTEN
        request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, _TCP_SHOW, states, bytes(48))
        for buffer, start, end in _request(request, _DUMP):
            if buffer[start + 1] == _LISTEN:
                listeners.add(_PORT.unpack_from(buffer, start + 4)[0])
            else:
                sockets[_U32.unpack_from(buffer, start + 68)[0]] = (buffer, start, end)
    return sockets, listeners


def _ask_unix(inode: int) -> _Place | None:
    request = _UNIX_REQUEST.pack(
        *(socket.AF_UNIX, 0, 0, 0xFFFF_FFFF, inode & 0xFFFF_FFFF, _UNIX_SHOW),
        *(_NO_COOKIE, _NO_COOKIE),
    )
    try:
        return next(_request(request, _ONE), None)
    except FileNotFoundError:
        return None  # The socket is closed, or in another network namespace.


def _find_tcp(inodes: set[int]) -> dict[int, bytes]:
    """Return the ids of these established sockets. Scans the whole table."""
    sockets = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _ESTABLISHED, bytes(48))
        for buffer, start, _ in _request(request, _DUMP, seconds=SINGLE_S):
            (inode,) = _U32.unpack_from(buffer, start + 68)
            if inode in inodes:
                sockets[inode] = buffer[start : start + 1] + buffer[start + 4 : start + 52]
    return sockets


def _listens_on(port: int) -> bool:
    id = _PORT.pack(port) + bytes(46)
    for family in (socket.AF_INET, socket.AF_INET6):
        # The kernel returns only sockets with this port (net/ipv4/inet_diag.c).
        request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _LISTEN, id)
        if any(True for _ in _request(request, _DUMP, seconds=SINGLE_S)):
            return True
    return False


def _ask_peer(id: bytes) -> int | None:
    """Return the inode of the socket at the other end of a TcpSocket.id."""
    address = _mirrored(id)
    ports, source, target = address[:4], address[4:20], address[20:]
    family = socket.AF_INET6
    if source.startswith(_MAPPED) and target.startswith(_MAPPED):
        family = socket.AF_INET
        source, target = (end[12:] + bytes(12) for end in (source, target))
    socket_id = ports + source + target + bytes(4) + struct.pack("=II", _NO_COOKIE, _NO_COOKIE)
    request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, socket_id)
    try:
        for buffer, start, _ in _request(request, _ONE):
            # If there is no such connection, the kernel returns a listening socket instead.
            if buffer[start + 1] == _ESTABLISHED and _address(buffer, start) == address:
                return int(_U32.unpack_from(buffer, start + 68)[0])
    except FileNotFoundError:
        pass
    return None


def _ask_tcp(inode: int, id: bytes, *, alone: bool = False) -> TcpSocket | None:
    """Query one socket. The id includes the kernel's cookie, so it matches no other socket.

    With `alone`, also query whether another socket listens on the same port.
    """
    request = _TCP_REQUEST.pack(id[0], socket.IPPROTO_TCP, _TCP_SHOW, 0, id[1:])
    try:
        places = list(_request(request, _ONE))
    except FileNotFoundError:
        return None  # The socket is closed.
    for buffer, start, end in places:
        same = _U32.unpack_from(buffer, start + 68)[0] == inode
        if same and buffer[start + 1] == _ESTABLISHED:
            (port,) = _PORT.unpack_from(buffer, start + 4)
            return _tcp(buffer, start, end, {port} if alone and _listens_on(port) else set())
    return None


def _request(
    request: bytes, flags: int, seconds: float | None = None, *, lock_s: float = -1
) -> Iterator[_Place]:
    """Yield the kernel's replies, for at most `seconds`; if that is None, at most MAX_SOCKETS
    replies. `lock_s`: how long to wait for other threads.

    Raises _TooMany above the limit, OSError (ENOENT if there is no such socket, or if the kernel
    lacks the family), ValueError and struct.error.
    """
    with _kernel(lock_s) as kernel:
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        length = _HEADER.size + len(request)
        kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        yield from _answers(kernel, flags, seconds)


@contextlib.contextmanager
def _kernel(lock_s: float) -> Iterator[socket.socket]:
    """Provide a netlink socket. Raises OSError."""
    if _netlink is None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as kernel:
            yield kernel
        return
    if not _netlink_lock.acquire(timeout=lock_s):
        raise TimeoutError("other threads use the netlink socket")
    try:
        yield _netlink
    finally:
        # Read the rest of this reply: otherwise, the next query, perhaps of the event loop, must
        # wait for it.
        with contextlib.suppress(OSError):
            while _netlink.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT):
                pass
        _netlink_lock.release()


def _answers(kernel: socket.socket, flags: int, seconds: float | None = None) -> Iterator[_Place]:
    count, begun = 0, time.monotonic()
    while True:
        if seconds is not None and time.monotonic() - begun > seconds:
            raise _TooMany("it takes too long to go through all sockets")
        buffer = kernel.recv(_RECEIVE_BYTES)
        start, size = 0, len(buffer)
        while start + _HEADER.size <= size:
            length, kind, _, _, _ = _HEADER.unpack_from(buffer, start)
            body, end = start + _HEADER.size, start + length
            if kind == _NLMSG_DONE:
                return
            if length < _HEADER.size or end > size:
                raise ValueError("the kernel's answer about sockets is cut off")
            if kind == _NLMSG_ERROR:
                error = -struct.unpack_from("=i", buffer, body)[0]
                raise OSError(error, os.strerror(error))
            count += 1
            if seconds is None and count > MAX_SOCKETS:
                raise _TooMany("too many sockets")
            yield buffer, body, end
            start += (length + 3) & ~3
        if flags == _ONE:
            return


def _attributes(buffer: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the type, start and end of each attribute. Raises ValueError and struct.error."""
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, start)
        if length < _ATTRIBUTE.size or start + length > end:
            raise ValueError("an attribute in the kernel's answer about sockets is cut off")
        yield kind, start + _ATTRIBUTE.size, start + length
        start += (length + 3) & ~3


def _unix(buffer: bytes, start: int, end: int) -> UnixSocket:
    name, peer, shut, receive, send = b"", 0, False, 0, 0
    for kind, at, past in _attributes(buffer, start + _UNIX_MESSAGE.size, end):
        if kind == _UNIX_NAME:
            name = (
                buffer[at:past].rstrip(b"\0") if buffer[at : at + 1] != b"\0" else buffer[at:past]
            )
        elif kind == _UNIX_PEER:
            (peer,) = _U32.unpack_from(buffer, at)
        elif kind == _UNIX_QUEUES:
            receive, send = _U32_U32.unpack_from(buffer, at)
        elif kind == _UNIX_SHUTDOWN:
            shut = bool(buffer[at] & _RECEIVE_SHUT)
    return UnixSocket(name, peer, shut, send, receive)


def _tcp(buffer: bytes, start: int, end: int, listeners: set[int]) -> TcpSocket:
    id = buffer[start : start + 1] + buffer[start + 4 : start + 52]
    (port,) = _PORT.unpack_from(buffer, start + 4)
    receive, send = _U32_U32.unpack_from(buffer, start + 56)
    unacked = acked = received = None
    for kind, at, past in _attributes(buffer, start + _TCP_MESSAGE_BYTES, end):
        if kind == _TCP_INFO and past - at >= _INFO_BYTES_ACKED + _U64_U64.size:
            (unacked,) = _U32.unpack_from(buffer, at + _INFO_UNACKED)
            acked, received = _U64_U64.unpack_from(buffer, at + _INFO_BYTES_ACKED)
    return TcpSocket(id, port in listeners, send, receive, unacked, acked, received)
