"""One client's connection: JSON messages that end with a NUL byte, over a unix socket.

Source: varlink.org, "Method Call". Clients may pipeline calls, which are answered in order.
Descriptors sent with a call (SCM_RIGHTS, unix(7)) belong to that call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from qkilld.debug_log import note_once
from qkilld.engine.fair_shares import user_of
from qkilld.foreign_descriptors import close_later, keep_urgent_data, receive

MAX_CALL: Final = 64 << 10
"""The maximum size of a call in bytes, without its NUL."""
MAX_CALL_OF_USER: Final = 16 << 10
"""The maximum size of a call from a user who has limits, in bytes. This limit is less than
MAX_CALL, because parsing and checking 64 KiB takes 10 ms."""
MAX_DESCRIPTORS: Final = 4
"""The maximum number of descriptors sent with one call."""
MAX_UNREAD: Final = 1 << 20
"""The maximum number of unhandled input bytes of one user other than root, over all connections."""
MAX_TOTAL: Final = 16 << 20
"""The maximum number of unhandled input bytes of all users other than root, in total."""
MAX_FIRST: Final = 32 << 10
"""A user's unhandled bytes beyond this number also count towards a limit that all users share: half
of MAX_TOTAL. So users with much input leave room for the calls of others."""
_READ: Final = 32 << 10
_SO_PEERPIDFD: Final = 77
"""Linux 6.5, include/uapi/asm-generic/socket.h; Python has no name for it yet."""
_UCRED: Final = struct.Struct("3i")


def encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def encode_list(name: str, elements: Iterable[bytes], more: Mapping[str, Any]) -> bytes:
    """Encode an object: the list `name`, whose elements are encoded already, and all of `more`."""
    return join_encoded(b'"%b":[%b]' % (name.encode(), b",".join(elements)), more)


def join_encoded(member: bytes, more: Mapping[str, Any]) -> bytes:
    """Encode an object: a member that is encoded already, and all of `more`."""
    return b"{%b,%b" % (member, encode(more)[1:]) if more else b"{%b}" % member


class InputBudget:
    """Limits the input (bytes) that is received but not handled yet."""

    def __init__(self, unlimited: frozenset[int]) -> None:
        """`unlimited`: uids without a limit."""
        self._unlimited = unlimited
        self._per_user: Counter[int] = Counter()
        self._further = 0
        """The sum, over all users, of the bytes beyond MAX_FIRST."""

    def is_unlimited(self, uid: int) -> bool:
        return uid in self._unlimited

    def take(self, uid: int, count: int) -> bool:
        """Reserve `count` bytes for a uid. Return False if this would exceed the limit of the
        uid or of all users."""
        if uid in self._unlimited:
            return True
        uid = user_of(uid)
        after = self._per_user.get(uid, 0) + count
        if after > MAX_UNREAD or self._per_user.total() + count > MAX_TOTAL:
            return False
        if after > MAX_FIRST and self._further + count > MAX_TOTAL // 2:
            return False
        self._set(uid, after)
        return True

    def give(self, uid: int, count: int) -> None:
        if uid not in self._unlimited:
            uid = user_of(uid)
            self._set(uid, self._per_user[uid] - count)

    def _set(self, uid: int, count: int) -> None:
        before = self._per_user.pop(uid, 0)
        self._further += max(0, count - MAX_FIRST) - max(0, before - MAX_FIRST)
        if count:
            self._per_user[uid] = count


class VarlinkConnection:
    """Reads calls and sends replies, without interpreting them."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        budget: InputBudget,
        on_call: Callable[[VarlinkConnection, bytes, list[int]], None],
        on_close: Callable[[VarlinkConnection], None],
    ) -> None:
        """`on_call` gets each call with its descriptors; after the reply, `next_call` must be
        called. `on_close` is called once when either end closes the connection."""
        sock.setblocking(False)
        keep_urgent_data(sock)
        self.name = name
        self.pid, self.uid, _ = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        """The peer. The pid is 0 if the process has no id in our PID namespace."""
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._budget = budget
        self._max_call = MAX_CALL if budget.is_unlimited(self.uid) else MAX_CALL_OF_USER
        self._on_call = on_call
        self._on_close = on_close
        self._incoming = bytearray()
        self._descriptors: list[int] = []
        self._outgoing = bytearray()
        self._calling = False
        """Whether a call is being answered. Up to `_max_call` bytes of later calls are read
        meanwhile; the rest stays in the socket."""
        self._reading = False
        self._ended = False
        """Whether the client has closed its sending side. The client may still read."""
        self._when_sent: list[Callable[[], None]] = []
        self.closed = False
        self._read_on(True)

    def open_peer(self) -> int | None:
        """Return a pidfd of the process that connected; None if the kernel has none. The caller
        must close it."""
        if self.closed:
            return None
        try:
            pidfd: int = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            note_once("getting the pidfd of a peer on Varlink", error)
            return None
        return pidfd

    @property
    def blocked(self) -> bool:
        """Whether messages wait because the socket is full."""
        return bool(self._outgoing)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the socket is full, the rest is sent later."""
        if not self.closed:
            self.send_encoded(encode(message))

    def send_encoded(self, message: bytes) -> None:
        """Send a message that was encoded by `encode`, `encode_list` or `join_encoded`."""
        if self.closed:
            return
        data = message + b"\0"
        if not self._outgoing:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                note_once("answering on Varlink", error)
                self.close()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._fd, self._write)
        self._outgoing += data

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call `callback` when everything has been sent or the connection is closed, perhaps at
        once."""
        if self._outgoing and not self.closed:
            self._when_sent.append(callback)
        else:
            callback()

    def next_call(self) -> None:
        """Handle the next call, because the current one is answered."""
        self._calling = False
        if self.closed:
            return
        if self._incoming or self._ended:
            self._loop.call_soon(self._hand_out)
        self._read_on(not self._ended)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._read_on(False)
        self._loop.remove_writer(self._fd)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._budget.is_unlimited(self.uid):
            self._sock.close()
        else:
            close_later(self._sock.detach())  # Unread messages may contain descriptors.
        for descriptor in self._descriptors:
            close_later(descriptor)
        self._descriptors.clear()
        self._outgoing.clear()
        self._budget.give(self.uid, len(self._incoming))
        self._incoming.clear()
        self._on_close(self)
        self._sent()

    def _read_on(self, wanted: bool) -> None:
        if wanted and not self._reading:
            self._loop.add_reader(self._fd, self._readable)
        elif not wanted and self._reading:
            self._loop.remove_reader(self._fd)
        self._reading = wanted

    def _readable(self) -> None:
        try:
            data, descriptors = receive(
                self._sock, _READ, trusted=self._budget.is_unlimited(self.uid)
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            note_once("reading a call on Varlink", error)
            self.close()
            return
        self._descriptors += descriptors
        if not data:
            self._end_of_calls()
            return
        if len(self._descriptors) > MAX_DESCRIPTORS or not self._budget.take(self.uid, len(data)):
            note_once("reading a call on Varlink", "it has too many descriptors or bytes")
            self.close()
            return
        self._incoming += data
        if self._calling:
            # Continue to read while a call is being answered, because only reading shows that the
            # client has disconnected. Stop when the buffer exceeds the maximum size of a call.
            if len(self._incoming) > self._max_call:
                self._read_on(False)
        else:
            self._hand_out()

    def _end_of_calls(self) -> None:
        """Handle the end of the input. Calls that were received before are still answered, unless
        the client has disconnected."""
        self._ended = True
        self._read_on(False)
        poll = select.poll()
        poll.register(self._fd, 0)
        if poll.poll(0) and self._calling:
            self.close()
        else:
            self._hand_out()

    def _hand_out(self) -> None:
        if self._calling or self.closed:
            return
        end = self._incoming.find(0)
        if end > self._max_call or (
            end < 0 and (self._ended or len(self._incoming) > self._max_call)
        ):
            if self._incoming:
                note_once("reading a call on Varlink", "it does not end, or is too long")
            self.close()
            return
        if end < 0:
            return
        call = bytes(self._incoming[:end])
        del self._incoming[: end + 1]
        self._budget.give(self.uid, end + 1)
        descriptors, self._descriptors = self._descriptors, []
        self._calling = True
        self._on_call(self, call, descriptors)

    def _write(self) -> None:
        try:
            del self._outgoing[: self._sock.send(self._outgoing)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            note_once("answering on Varlink", error)
            self.close()
            return
        if not self._outgoing:
            self._loop.remove_writer(self._fd)
            self._sent()

    def _sent(self) -> None:
        waiting, self._when_sent = self._when_sent, []
        for callback in waiting:
            callback()
