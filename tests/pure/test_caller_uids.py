"""The uids of callers on the bus: each is requested once, and 4,096 are cached."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from qkilld.bus.connection import Connection
from qkilld.bus.framing import IncomingMessage, MessageKind
from qkilld.bus.server import MAX_NAMES, ObjectTree, Server
from qkilld.engine.turns import Turns

UID = 1000


class FakeConnection:
    """A bus that knows every name."""

    def __init__(self) -> None:
        self.on_call: Callable[[IncomingMessage], None]
        self.asked: Counter[str] = Counter()
        """How often the uid of each name was requested."""
        self.answered: list[tuple[str, int]] = []
        """Sender and serial of each call."""
        self.connected = True
        self._serials = itertools.count(1)
        self._owner_changed: Callable[[list[Any]], None]

    def watch_names(self, handler: Callable[[list[Any]], None]) -> None:
        self._owner_changed = handler

    async def uid_of(self, name: str) -> int:
        self.asked[name] += 1
        await asyncio.sleep(0)
        return UID

    def reply(self, call: IncomingMessage, signature: str, body: bytearray) -> None:
        self.answered.append((call.sender, call.serial))

    def call(self, sender: str) -> None:
        """Receive a call of Ping."""
        self.on_call(
            IncomingMessage(
                MessageKind.CALL,
                0,
                next(self._serials),
                "<",
                path="/",
                interface="org.freedesktop.DBus.Peer",
                member="Ping",
                sender=sender,
            )
        )

    async def answer_all(self, server: Server) -> None:
        for _ in range(1000):
            if not server.busy:
                return
            await asyncio.sleep(0)
        raise AssertionError("a call is not answered")

    def disconnect(self, sender: str) -> None:
        self._owner_changed([sender, sender, ""])


def serve() -> tuple[FakeConnection, Server]:
    bus = FakeConnection()

    def fault(doing: str, error: BaseException) -> None:
        raise AssertionError(doing) from error

    turns = Turns(frozenset({0}))
    return bus, Server(cast(Connection, bus), cast(ObjectTree, None), fault, turns)


def name(number: int) -> str:
    return f":1.{number}"


def test_the_most_recent_4096_names_are_remembered() -> None:
    async def run() -> None:
        bus, server = serve()

        async def call(number: int) -> None:
            bus.call(name(number))
            await bus.answer_all(server)

        for number in range(4096):
            await call(number)
        assert len(bus.answered) == 4096
        # Within the limit, no uid is requested twice. This call makes the first name the most
        # recently used.
        await call(0)
        assert set(bus.asked.values()) == {1}
        await call(4096)
        assert bus.asked[name(4096)] == 1
        assert len(server._uids) == 4096 == MAX_NAMES
        # The first name is still cached. The second was dropped, so its uid is requested again.
        await call(0)
        assert bus.asked[name(0)] == 1
        await call(1)
        assert bus.asked[name(1)] == 2
        assert len(server._uids) == 4096
        assert len(bus.answered) == 4096 + 4

    asyncio.run(run())


def test_a_name_that_is_gone_is_forgotten() -> None:
    async def run() -> None:
        bus, server = serve()
        bus.call(name(1))
        await bus.answer_all(server)
        bus.disconnect(name(1))
        assert not server._uids

    asyncio.run(run())


def test_a_name_whose_calls_wait_is_not_forgotten() -> None:
    """If the name was forgotten, its next call would overtake its waiting calls."""

    async def run() -> None:
        bus, server = serve()
        bus.call(name(0))
        await bus.answer_all(server)
        bus.answered.clear()
        for _ in range(3):
            bus.call(name(0))
        # Before these calls are served, 4,096 other names are cached.
        for number in range(1, 4097):
            server._remember(name(number), UID)
        bus.call(name(0))
        await bus.answer_all(server)
        serials = [serial for sender, serial in bus.answered if sender == name(0)]
        assert len(serials) == 4
        assert serials == sorted(serials)
        assert bus.asked[name(0)] == 1
        assert len(server._uids) == MAX_NAMES

    asyncio.run(run())
