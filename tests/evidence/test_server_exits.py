"""Which servers ended, or closed a connection, before a guest did."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from qkilld.adapters.clock import LoopClock
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.engine.ports import Process
from qkilld.evidence import server_exits
from qkilld.evidence.file_budget import SPARE, FileBudget
from qkilld.evidence.kept_file import kept_files
from qkilld.evidence.server_exits import GuestServerExits
from qkilld.evidence.sockdiag import SocketTable
from qkilld.model.guest import Guest, Label
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


def test_when_a_server_started_and_whether_it_has_ended(guest: subprocess.Popen[bytes]) -> None:
    with exits(guest.pid) as watched:
        before = time.monotonic_ns() // 1000
        with sleeper() as server, sleeper() as other:
            assert watched.started(server.pid) is None
            watched.add(server.pid, NOW)
            started = watched.started(server.pid)
            assert started is not None and abs(started - before) < 1_000_000
            watched.add(other.pid, 0)  # The id has been reused.
            assert not watched.has_ended(server.pid) and watched.has_ended(other.pid)
        assert watched.has_ended(server.pid) and watched.started(server.pid) == started
        watched.remove(server.pid)
        assert not watched.has_ended(server.pid) and watched.started(server.pid) is None


def test_no_descriptor_remains(guest: subprocess.Popen[bytes]) -> None:
    before = descriptors()
    with sleeper() as server, exits(guest.pid) as watched:
        watched.add(server.pid, NOW)
    assert descriptors() == before


def test_a_server_needs_one_descriptor_until_it_is_removed(
    guest: subprocess.Popen[bytes],
) -> None:
    with sleeper() as server, exits(guest.pid) as watched:
        before, counted = descriptors(), GuestServerExits.descriptors
        for _ in range(3):
            watched.add(server.pid, NOW)
        assert len(descriptors()) == len(before) + 1
        assert GuestServerExits.descriptors == counted + 1
        watched.remove(server.pid)
        watched.remove(server.pid)
        assert (descriptors(), GuestServerExits.descriptors) == (before, counted)
        end(server)
        end(guest)
        assert watched.ended() == (frozenset(), frozenset())


def test_a_process_id_that_is_added_again_after_its_end(guest: subprocess.Popen[bytes]) -> None:
    with sleeper() as first, sleeper() as second, exits(guest.pid) as watched:
        for server in (first, second):
            watched.add(server.pid, NOW)
            end(server)
        watched.add(second.pid, NOW)
        end(guest)
        assert watched.ended() == (frozenset({first.pid, second.pid}), frozenset())


def test_the_number_of_servers_is_limited(
    guest: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_exits, "MAX_SERVERS", 1)
    with sleeper() as one, sleeper() as other, exits(guest.pid) as watched:
        watched.add(one.pid, NOW)
        watched.add(other.pid, NOW)
        assert watched.unwatched == {other.pid}
        watched.remove(one.pid)
        watched.add(other.pid, NOW)
        assert watched.unwatched == frozenset()
        end(guest)
        assert watched.ended() == (frozenset(), frozenset())


def test_users_share_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with many guests leaves descriptors to other users. Root takes as many as it needs."""
    monkeypatch.setattr(server_exits, "_SHARE", resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(sleeper()).pid for _ in range(4)]

        def watch(uid: int, count: int) -> GuestServerExits:
            process = open_process(stack.enter_context(sleeper()).pid)
            stack.callback(process.close)
            identity = replace(process.identity, uid=uid)
            guest = SimpleNamespace(guest=Guest(identity, Label()), fileno=process.fileno)
            watched = GuestServerExits(cast(Process, guest), started_at)
            stack.callback(watched.close)
            for pid in servers[:count]:
                watched.add(pid, NOW)
            return watched

        first, second = watch(1000, 3), watch(1000, 4)
        assert (first.unwatched, second.unwatched) == (frozenset(), frozenset(servers[1:]))
        other = watch(1001, 3)
        # Each user now watches two servers: the newest ones of the first user were given up.
        assert first.unwatched == {servers[2]} and second.unwatched == set(servers)
        assert other.unwatched == {servers[2]}
        root = watch(0, 4)
        assert root.unwatched == frozenset()
        assert first.unwatched == other.unwatched == set(servers[:3])
        more = watch(1002, 1)
        assert more.unwatched == {servers[0]} and root.unwatched == frozenset()
        # Root's guests do not take descriptors from each other either.
        assert watch(0, 1).unwatched == {servers[0]} and root.unwatched == frozenset()
        root.close()
        more.add(servers[0], NOW)
        assert more.unwatched == frozenset()
    assert not GuestServerExits._servers and not GuestServerExits._of_user


@pytest.mark.parametrize("left", [0, 1])
def test_no_descriptor_is_left(guest: subprocess.Popen[bytes], left: int) -> None:
    counted = GuestServerExits.descriptors
    process = open_process(guest.pid)
    with contextlib.closing(process), descriptors_left(left), pytest.raises(OSError) as raised:
        GuestServerExits(process, started_at)
    assert raised.value.errno == errno.EMFILE
    assert GuestServerExits.descriptors == counted
    with sleeper() as server, exits(guest.pid) as watched:
        before = descriptors()
        with descriptors_left(left):
            watched.add(server.pid, NOW)
        assert watched.unwatched == {server.pid}
        assert descriptors() == before


def test_the_files_of_samples_leave_room_for_them(guest: subprocess.Popen[bytes]) -> None:
    class Keeper:
        def stop_keeping(self) -> None: ...

    budget = FileBudget((kept_files() + GuestServerExits.descriptors + SPARE) * 3 // 2 + 1)
    assert budget.admit(Keeper())
    with exits(guest.pid):
        assert not budget.admit(Keeper())


@contextlib.contextmanager
def descriptor_limit(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """Within the context, let this process open only `number` more descriptors."""
    fillers: list[int] = []
    with Path("/dev/null").open("rb") as null, contextlib.ExitStack() as stack:
        limit = 4 * (GuestServerExits.descriptors + len(descriptors()) + 8)
        stack.enter_context(descriptor_limit(limit))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(null.fileno()))
            for _ in range(number):
                os.close(fillers.pop())
            yield
        finally:
            for fd in fillers:
                os.close(fd)


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
