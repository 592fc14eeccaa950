"""Descriptors and sockets that a stranger shares with the daemon never make it wait."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld import foreign_descriptors
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.fuse import fuse_store
from tests.lab.guest import Guest
from tests.lab.lingering import lingering_sockets
from tests.lab.process import OTHER_UID, end, spawn
from tests.monitor.test_tcp import connected
from tests.varlink.conftest import StartDaemon, VarlinkService
from tests.varlink.test_passing import descriptors_of, on_tcp

Start = Callable[..., Guest]
CALL = b'{"method":"org.qkilld1.GetStatus","parameters":{}}\0'
PATIENCE_S = 40.0
"""How long (s) a client waits for a reply. This is shorter than the time for which a descriptor
would make the daemon wait."""


def uid() -> int | None:
    return OTHER_UID if os.geteuid() == 0 else None


def is_served(service: VarlinkService) -> bool:
    with service.client() as client:
        client.socket.settimeout(PATIENCE_S)
        return bool(client.call("GetStatus"))


@pytest.fixture
def lingering() -> Iterator[Callable[[], socket.socket]]:
    with lingering_sockets(300) as make:
        yield make


def in_a_socket(passed: list[socket.socket]) -> list[socket.socket]:
    """Put the sockets into the buffer of another socket; return the other socket."""
    one, other = socket.socketpair()
    socket.send_fds(one, [b"x"], [each.fileno() for each in passed])
    one.close()
    return [other]


@pytest.mark.parametrize("way", ["call", "too many", "urgent", "within a socket", "no end", "rest"])
def test_a_socket_that_lingers(
    service: VarlinkService, lingering: Callable[[], socket.socket], way: str
) -> None:
    before = descriptors_of(service.daemon)
    passed = [lingering() for _ in range(6 if way == "too many" else 1)]
    if way == "within a socket":
        inner, passed = passed, in_a_socket(passed)
        inner[0].close()
    with service.client(uid()) as client:
        numbers = [each.fileno() for each in passed]
        match way:
            case "urgent":
                socket.send_fds(client.socket, [b" "], numbers, socket.MSG_OOB)
                client.send_raw(CALL)
            case "no end":  # This is longer than a call may be, and is never read to its end.
                client.socket.setblocking(False)
                with contextlib.suppress(OSError):
                    while True:
                        socket.send_fds(client.socket, [b" " * 4096], numbers)
            case "rest":
                client.send_raw(CALL * 100)
                socket.send_fds(client.socket, [CALL], numbers)
            case _:
                socket.send_fds(client.socket, [CALL], numbers)
        for each in passed:
            each.close()
        if way == "rest":
            client.socket.close()
        assert is_served(service)
        assert is_served(service)
    until(lambda: descriptors_of(service.daemon), lambda now: now <= before)


FROM_A_FILE_SERVER = """
import os, socket, sys
socket_path, uid, count, file = sys.argv[1:]
fd = os.open(file, os.O_RDONLY)
print(flush=True)
input()
os.setuid(int(uid))
for _ in range(int(count)):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(socket_path)
        socket.send_fds(client, [CALL], [fd])
        try:
            client.recv(4096)
        except OSError:
            pass
print(flush=True)
input()
""".replace("CALL", repr(CALL))


@contextlib.contextmanager
def passed_files(service: VarlinkService, directory: Path, count: int) -> Iterator[None]:
    """Another user has passed a file `count` times. Its close(2) returns only at the end of this
    context; not even SIGKILL interrupts it."""
    needs.root("to mount a file system in user space")
    (directory / "file").write_bytes(b"x")
    with contextlib.ExitStack() as stack:
        # Processes that have the file can end only after the store, so end the store first.
        ends = stack.enter_context(contextlib.ExitStack())
        store = stack.enter_context(fuse_store(directory))
        store.hang("flush")
        argv = [sys.executable, "-c", FROM_A_FILE_SERVER, str(service.path)]
        argv += [str(OTHER_UID), str(count)]
        argv += [str(store.directory / "file")]
        child = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ends.callback(end, child)
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline()
        yield


def test_a_file_whose_server_does_not_answer(service: VarlinkService, lab_dir: Path) -> None:
    before = descriptors_of(service.daemon)
    with passed_files(service, lab_dir, 3 * foreign_descriptors.MAX_THREADS):
        assert is_served(service)
        with service.client(OTHER_UID) as client:
            assert client.call("GetStatus")

        def is_refused() -> bool:
            """Whether the daemon refuses further descriptors of users."""
            read, write = os.pipe()
            with service.client(OTHER_UID) as client:
                socket.send_fds(client.socket, [CALL], [read])
                os.close(read)
                os.close(write)
                try:
                    return client.receive() is None
                except (EOFError, ConnectionResetError):
                    return True

        until(is_refused, bool)
        read, write = os.pipe()
        with service.client() as client:
            socket.send_fds(client.socket, [CALL], [read])
            assert client.reply()
        os.close(read)
        os.close(write)
    until(lambda: descriptors_of(service.daemon), lambda now: now <= before)


@contextlib.contextmanager
def kept_busy(service: VarlinkService) -> Iterator[None]:
    """Call the daemon all the time."""
    stop = threading.Event()

    def call() -> None:
        while not stop.wait(0.05):
            is_served(service)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_daemon_does_not_exit_idle_while_such_a_file_is_open(
    start_daemon: StartDaemon, socket_path: Path, lab_dir: Path
) -> None:
    """If the daemon exited, the kernel would not let it end, so no other daemon would start."""
    idle_s = 1.5
    daemon = start_daemon("--varlink", str(socket_path), "--exit-idle", f"{idle_s}s")
    service = VarlinkService(daemon, socket_path)
    with contextlib.ExitStack() as stack:
        with kept_busy(service):
            stack.enter_context(passed_files(service, lab_dir, 1))
        since = time.monotonic()
        while time.monotonic() < since + 2 * idle_s:
            assert daemon.process.poll() is None
            time.sleep(0.02)
        assert is_served(service)
        assert "is idle" not in daemon.stderr.text()
    assert daemon.wait_gone() == 0


def test_a_monitor_that_is_made_to_block(service: VarlinkService, qemu: Start) -> None:
    """The client that passed the connection still has it, and can change its flags."""
    guest = qemu(qmp=False, arguments=on_tcp())
    with connected(guest) as connection, service.client() as client:
        assert select.select([connection], [], [], 30)[0]  # the greeting, which stays unread
        guest.signal(signal.SIGSTOP)
        stop = threading.Event()

        def block() -> None:
            """Keep the buffer of the connection full, and its O_NONBLOCK cleared."""
            while not stop.wait(0.001):
                connection.setblocking(True)
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        connection.send(b" " * (1 << 16), socket.MSG_DONTWAIT)

        thread = threading.Thread(target=block)
        thread.start()
        try:
            # Repeat this, because the kernel may enlarge the buffer while it fills.
            until(lambda: select.select([], [connection], [], 1)[1], lambda room: not room)
            client.send(
                "Terminate",
                descriptors=[connection.fileno()],
                pid=guest.pid,
                flags=["powerdown"],
                monitorIndex=0,
            )
            assert client.reply()
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                assert is_served(service)
                time.sleep(0.05)
        finally:
            stop.set()
            thread.join()
            guest.signal(signal.SIGCONT)
