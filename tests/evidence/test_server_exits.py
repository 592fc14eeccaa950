"""Which servers ended, or closed a connection, before a guest did."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.adapters.clock import LoopClock
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.evidence.server_exits import GuestServerExits
from qkilld.evidence.sockdiag import SocketTable
from tests.evidence.until import until
from tests.lab.process import end, spawn
from tests.monitor.connecting import run


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(["sleep", "600"])
    try:
        yield process
    finally:
        end(process)


@pytest.fixture
def guest() -> Iterator[subprocess.Popen[bytes]]:
    with sleeper() as process:
        yield process


@contextlib.contextmanager
def exits(pid: int) -> Iterator[GuestServerExits]:
    process: PidfdProcess = open_process(pid)
    one = GuestServerExits(process, started_at)
    try:
        yield one
    finally:
        one.close()
        process.close()


def started_at(start_time: int) -> int:
    async def ask() -> int:
        return LoopClock().started_at(start_time)

    return run(ask())


NOW = 1 << 62
"""Later than the start of any process."""


def test_the_order_is_that_of_the_ends_not_of_the_questions(
    guest: subprocess.Popen[bytes],
) -> None:
    with contextlib.ExitStack() as stack:
        first, later, lasting = (stack.enter_context(sleeper()) for _ in range(3))
        watched = stack.enter_context(exits(guest.pid))
        for server in (lasting, later, first):
            watched.add(server.pid, NOW)
        for process in (first, guest, later):
            process.kill()
            process.wait()
        assert watched.ended() == (frozenset({first.pid}), frozenset({later.pid}))


def test_a_server_that_is_gone_or_another_process_by_now(guest: subprocess.Popen[bytes]) -> None:
    with sleeper() as gone, sleeper() as young, exits(guest.pid) as watched:
        end(gone)
        watched.add(gone.pid, NOW)
        watched.add(young.pid, 0)
        end(guest)
        assert watched.ended() == (frozenset({gone.pid, young.pid}), frozenset())


def test_no_descriptor_remains(guest: subprocess.Popen[bytes]) -> None:
    before = descriptors()
    with sleeper() as server, exits(guest.pid) as watched:
        watched.add(server.pid, NOW)
    assert descriptors() == before


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@contextlib.contextmanager
def connection(family: socket.AddressFamily) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """Yield both ends, and the id of the first."""
    with socket.socket(family) as listener, socket.socket(family) as client:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            tcp = SocketTable().tcp(os.fstat(client.fileno()).st_ino)
            assert tcp is not None
            yield client, server, tcp.id.hex()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_which_end_closed_a_connection_first(
    guest: subprocess.Popen[bytes], family: socket.AddressFamily
) -> None:
    with exits(guest.pid) as watched:
        with connection(family) as (client, server, tcp_id):
            assert watched.closed_first(tcp_id) is None
            client.close()
            assert watched.closed_first(tcp_id) is True  # FIN_WAIT
            server.close()
            assert watched.closed_first(tcp_id) is True  # TIME_WAIT
        with connection(family) as (client, server, tcp_id):
            server.close()
            assert watched.closed_first(tcp_id) is None
            client.close()
            until(lambda: watched.closed_first(tcp_id), lambda value: value is False)
        with connection(family) as (client, server, tcp_id):
            client.send(b"unread")
            server.close()  # This resets the connection.
            client.close()
            assert watched.closed_first(tcp_id) is False
        assert watched.closed_first("") is None
