"""Buses that cannot be reached, and buses that take a while."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.bus.connection import Connection, connect
from qkilld.model.bus_address import BusAddress
from qkilld.model.errors import BusError
from tests.lab.bus import Bus, private_bus


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
    """connect(2) would block; the event loop goes on until the timeout."""
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
