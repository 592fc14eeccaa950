"""Send hostile messages over several connections at once.

    python -m tests.fuzz.hostile ORDER

ORDER is JSON, see Order. The program ends after the number of messages or the time in ORDER, and
prints what it did as JSON, see Deeds. The content of the messages depends only on the seed; their
timing does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.fuzz.calls import CallSource
from tests.fuzz.messages import BUS_NAME, RETURN, Aims, Message, SendMode, Source

AT_ONCE: Final = 100
"""The maximum number of unanswered calls of a connection. A system bus itself refuses more than
128."""
STUCK_S: Final = 0.5
"""If a Varlink connection gets no reply for this long, its calls wait for jobs."""
_READ: Final = 1 << 16
_FIXED_HEADER: Final = 16


@dataclass(frozen=True)
class Order:
    address: str
    seed: int
    connections: int
    messages: int
    seconds: float
    destination: str = BUS_NAME
    """The bus name to which messages for the daemon are sent."""
    own: Sequence[int] = ()
    others: Sequence[int] = ()
    uid: int | None = None
    """The attacker's user; None for the current one."""
    varlink: str = ""
    """The daemon's Varlink socket, to which as many connections are made as to the bus; "" for
    none."""


@dataclass
class Deeds:
    """The number of messages sent by kind, and their results."""

    sent: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    """Method returns and errors received."""
    ended: int = 0
    """Connections ended by the bus, or cut off in the middle of a message."""


class _HostileClient:
    """A client that connects again when its connection ends. Subclasses set these attributes."""

    _socket: socket.socket
    _deeds: Deeds

    def fileno(self) -> int:
        return self._socket.fileno()

    def _connect(self) -> None:
        raise NotImplementedError

    def _reconnect(self) -> None:
        self._deeds.ended += 1
        self._socket.close()
        self._connect()

    def _receive(self) -> bytes:
        """Return the received bytes; b"" if there are none, or if the connection has ended."""
        try:
            chunk = self._socket.recv(_READ)
        except BlockingIOError:
            return b""
        except OSError:
            chunk = b""
        if not chunk:
            self._reconnect()
        return chunk


class Attacker(_HostileClient):
    """Opens one connection after another, each with its own sequence of messages."""

    def __init__(self, order: Order, number: int, deeds: Deeds) -> None:
        self._path = order.address.partition("path=")[2].partition(",")[0]
        self._destination = order.destination
        self._deeds = deeds
        self._source = Source(f"{order.seed}/{number}", Aims(order.own, order.others))
        self._rng = random.Random(f"{order.seed}/{number}/pace")
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(self._path)
        uid = str(os.geteuid()).encode().hex()
        self._socket.sendall(b"\0AUTH EXTERNAL " + uid.encode() + b"\r\n")
        self._socket.recv(4096)
        self._socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        self._socket.recv(4096)
        self._socket.sendall(b"BEGIN\r\n")
        self._serial = 1
        bus = "org.freedesktop.DBus"
        hello = Message(
            path="/org/freedesktop/DBus", interface=bus, member="Hello", destination=bus
        )
        self._socket.sendall(hello.marshal(1))
        self._socket.setblocking(False)
        self._incoming = bytearray()
        self._outgoing = b""
        self._waiting = 1
        self._deaf = 0
        """The number of messages to send before reading again."""

    def read(self) -> None:
        """Read what has arrived, and count the replies."""
        if not (chunk := self._receive()):
            return
        self._incoming += chunk
        while len(self._incoming) >= _FIXED_HEADER:
            order = "<" if self._incoming[:1] == b"l" else ">"
            kind = self._incoming[1]
            body, _, fields = struct.unpack_from(order + "4xIII", self._incoming)
            length = _FIXED_HEADER + fields + (-fields & 7) + body
            if len(self._incoming) < length:
                return
            del self._incoming[:length]
            if kind in (RETURN, RETURN + 1):
                self._deeds.replies += 1
                self._waiting -= 1

    @property
    def ready(self) -> bool:
        """Whether it may send another message."""
        return bool(self._outgoing) or self._waiting < AT_ONCE

    @property
    def deaf(self) -> bool:
        return self._deaf > 0

    def send(self) -> int:
        """Send a few messages; return how many."""
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
                return 0
            if self._rng.random() < 0.001:
                self._deaf = 90
            return self._send_next()
        except BlockingIOError:
            return 0
        except OSError:
            self._reconnect()
            return 0

    def _send_next(self) -> int:
        name, message, how = self._source.next()
        if message.destination == BUS_NAME:
            message.destination = self._destination
        self._serial += 1
        raw = message.marshal(self._serial)
        self._deeds.sent[name] += 1
        self._deaf -= 1
        if how is not SendMode.WHOLE:
            raw = self._source.damage(raw, how)
        self._waiting += message.wants_reply
        files: list[int] = []
        with contextlib.ExitStack() as stack:
            if message.descriptors and how is SendMode.WHOLE:
                null = os.open("/dev/null", os.O_RDONLY)
                stack.callback(os.close, null)
                files = [null] * message.descriptors
            sent = socket.send_fds(self._socket, [raw], files) if files else self._socket.send(raw)
        self._outgoing = raw[sent:]
        if how is SendMode.CUT:
            self._reconnect()
        return 1


class VarlinkAttacker(_HostileClient):
    """Does the same on Varlink. If a connection gets no reply for STUCK_S, it is replaced."""

    def __init__(self, order: Order, number: int, deeds: Deeds) -> None:
        self._path = order.varlink
        self._deeds = deeds
        self._source = CallSource(f"{order.seed}/{number}", Aims(order.own, order.others))
        self._null = os.open("/dev/null", os.O_RDONLY)
        self.deaf = False
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(self._path)
        self._socket.setblocking(False)
        self._outgoing = b""
        self._waiting = 0
        self._moved = time.monotonic()

    def read(self) -> None:
        """Read what has arrived, and count the replies."""
        if not (chunk := self._receive()):
            return
        replies = chunk.count(b"\0")
        self._deeds.replies += replies
        self._waiting = max(0, self._waiting - replies)
        self._moved = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether it may send another message."""
        if time.monotonic() - self._moved > STUCK_S:
            self._reconnect()
        return bool(self._outgoing) or self._waiting < AT_ONCE

    def send(self) -> int:
        """Send the rest of a message, or the next message. Return how many were begun."""
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
                return 0
            call = self._source.next()
            files = [self._null] * call.descriptors
            sent = (
                socket.send_fds(self._socket, [call.data], files)
                if files
                else self._socket.send(call.data)
            )
        except BlockingIOError:
            return 0
        except OSError:
            self._reconnect()
            return 0
        self._deeds.sent[call.kind] += 1
        self._outgoing = call.data[sent:]
        self._waiting += call.replies
        if call.ends:
            self._reconnect()
        return 1


def attack(order: Order) -> Deeds:
    deeds = Deeds()
    end = time.monotonic() + order.seconds
    numbers = range(order.connections)
    attackers: list[Attacker | VarlinkAttacker] = [Attacker(order, each, deeds) for each in numbers]
    if order.varlink:
        attackers += [VarlinkAttacker(order, each, deeds) for each in numbers]
    remaining = order.messages
    while remaining > 0 and (now := time.monotonic()) < end:
        with selectors.DefaultSelector() as selector:
            for one in attackers:
                wanted = 0 if one.deaf else selectors.EVENT_READ
                wanted |= selectors.EVENT_WRITE if one.ready or one.deaf else 0
                selector.register(one, wanted, one)
            ready = selector.select(min(1.0, end - now))
        for key, events in ready:
            one = key.data
            if events & selectors.EVENT_READ:
                one.read()
            if events & selectors.EVENT_WRITE:
                for _ in range(16):
                    if remaining <= 0 or not (one.ready or one.deaf):
                        break
                    remaining -= one.send()
    return deeds


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    if order.uid is not None:
        # Change the user after the imports, because other users may not read the checkout.
        os.setgroups([])
        os.setresgid(order.uid, order.uid, order.uid)
        os.setresuid(order.uid, order.uid, order.uid)
    print(json.dumps(vars(attack(order))), flush=True)


if __name__ == "__main__":
    main()
