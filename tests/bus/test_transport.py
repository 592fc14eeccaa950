"""Buses that cannot be reached, and buses that are slow."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    new_method_call,
    new_signal,
)
from jeepney.io.blocking import open_dbus_connection  # type: ignore[import-untyped]

from qkilld.bus.connection import Connection, connect
from qkilld.model.bus_address import BusAddress
from qkilld.model.errors import BusError
from tests.lab.bus import Bus, private_bus
from tests.lab.lingering import lingering_sockets

DBUS = "org.freedesktop.DBus"


async def version_of(address: str, timeout_s: float = 10) -> str:
    connection: Connection = await connect(BusAddress(address=address), timeout_s=timeout_s)
    try:
        (text,) = await connection.request_bus("GetId")
    finally:
        connection.close()
    return str(text)


@pytest.fixture
def listening(lab_dir: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that accepts no connections, and its address."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{lab_dir}/s")
        sock.listen(0)
        yield sock, f"unix:path={lab_dir}/s"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "the bus closed the connection during authentication"),
        (b"REJECTED DBUS_COOKIE_SHA1\r\n", "REJECTED"),
        (b"x" * 5000, "the peer does not authenticate as a bus does"),
        (b"OK 1234\r\n", "(the bus closed the connection|Broken pipe|reset)"),
    ],
)
def test_a_peer_that_is_not_a_bus_is_reported(
    listening: tuple[socket.socket, str], answer: bytes, said: str
) -> None:
    def serve() -> None:
        peer, _ = listening[0].accept()
        with peer:
            peer.recv(100)
            peer.sendall(answer)
            if answer.startswith(b"OK"):
                peer.recv(10)  # BEGIN

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(BusError, match=f"cannot connect to the bus at unix:path=.*: .*{said}"):
        asyncio.run(version_of(listening[1]))
    thread.join()


def test_a_bus_that_does_not_answer(listening: tuple[socket.socket, str]) -> None:
    with pytest.raises(BusError, match="no answer"):
        asyncio.run(version_of(listening[1], 0.2))


def test_a_bus_with_a_full_backlog(listening: tuple[socket.socket, str]) -> None:
    """connect(2) would block. The event loop keeps running until the timeout."""
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(listening[0].getsockname())

        async def ticks() -> int:
            count = 0
            task = asyncio.create_task(version_of(listening[1], 0.5))
            while not task.done():
                await asyncio.sleep(0.01)
                count += 1
            with pytest.raises(BusError, match="no answer"):
                await task
            return count

        assert asyncio.run(ticks()) > 5


def test_the_first_address_that_works(private_bus: Bus, lab_dir: Path) -> None:
    assert asyncio.run(version_of(f"unix:path={lab_dir}/none;{private_bus.address}"))


@pytest.mark.parametrize("address", ["unix:path=/nowhere/bus", "tcp:port=x", "launchd:env=X", "y"])
def test_unreachable_addresses(address: str) -> None:
    with pytest.raises(BusError, match="cannot connect to the bus at"):
        asyncio.run(version_of(address))


def test_a_bus_that_is_full() -> None:
    with (
        private_bus({"max_connections_per_user": 1}) as full,
        full.client(),
        pytest.raises(BusError, match="cannot connect to the bus at"),
    ):
        asyncio.run(version_of(full.address))


@pytest.mark.parametrize("read", [True, False])
def test_a_descriptor_that_lingers(private_bus: Bus, read: bool) -> None:
    """Any user of the bus may send such a descriptor to a connection that accepts descriptors. The
    receiver must not block when it drops the descriptor, nor when it closes the connection before
    it has read the descriptor."""
    driver = DBusAddress("/org/freedesktop/DBus", DBUS, DBUS)

    def send(name: str) -> None:
        passed = make()
        signal = new_signal(DBusAddress("/x", name, "a.b"), "C", "h", (passed,))
        signal.header.fields[HeaderFields.destination] = name
        sender.send(signal)
        passed.close()

    def wait_received(sock: socket.socket) -> None:
        assert select.select([sock], [], [], 30)[0]
        time.sleep(0.2)  # until the bus has closed its copy

    async def receive() -> float:
        connection = await connect(BusAddress(address=private_bus.address), descriptors=True)
        names = sender.send_and_get_reply(new_method_call(driver, "ListNames")).body[0]
        (name,) = set(names) - {DBUS, sender.unique_name}
        send(name)
        wait_received(connection._sock)
        since = time.monotonic()
        if read:
            await asyncio.sleep(0.01)
            assert not select.select([connection._sock], [], [], 0)[0]
            await connection.request_bus("GetId")
        connection.close()
        return time.monotonic() - since

    with (
        lingering_sockets(5) as make,
        open_dbus_connection(private_bus.address, enable_fds=True) as sender,
    ):
        assert asyncio.run(receive()) < 3
