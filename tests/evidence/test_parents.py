"""The processes that start servers: for one connection, or for good."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence.sockets import SocketTable
from qkilld.model.sample import Peer
from tests.evidence.test_peers import end_of, server_of
from tests.evidence.until import until
from tests.lab.process import end, spawn

_SERVER = """
import os, socket, subprocess, sys
how, path = sys.argv[1:]
if how == "launch":
    sys.exit(subprocess.call([sys.executable, __file__, "serve", path]))
if how == "hold":
    sys.exit(os.read(0, 1))
if path.isdecimal():
    listener = socket.create_server(("127.0.0.1", int(path)))
else:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
connection, _ = listener.accept()
if how == "spawn":
    command = [sys.executable, __file__, "hold", path]
    child = subprocess.Popen(["sh", "-c", '"$@"; exit', "sh", *command], stdin=connection)
    connection.close()
    sys.exit(child.wait())
if how == "close":
    listener.close()
if how == "fork" and (child := os.fork()):
    connection.close()
    os.waitpid(child, 0)
else:
    connection.recv(1)
"""


@contextlib.contextmanager
def serving(directory: Path, how: str, family: str = "unix") -> Iterator[tuple[int, Peer]]:
    """Yield a process that starts servers, and the server of our connection."""
    script, path = directory / "server.py", directory / "socket"
    script.write_text(_SERVER)
    address: Any = str(path)
    if family == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
    starter = spawn([sys.executable, script, how, str(address[1]) if family == "tcp" else address])
    kind = socket.AF_INET if family == "tcp" else socket.AF_UNIX
    try:
        with contextlib.ExitStack() as stack:

            def connect() -> socket.socket | None:
                connection = stack.enter_context(socket.socket(kind))
                return None if connection.connect_ex(address) else connection

            connection = until(connect, bool)
            assert connection is not None
            inode = until(lambda: other_end(connection), bool)
            alone = how in ("serve", "close")
            yield starter.pid, server_of(inode, lambda peer: alone or peer.pid != starter.pid)
    finally:
        end(starter)


def other_end(connection: socket.socket) -> int:
    if connection.family == socket.AF_UNIX:
        return end_of(connection)
    table = SocketTable()
    tcp = table.tcp(os.fstat(connection.fileno()).st_ino)
    return (tcp and table.tcp_peer(tcp.id)) or 0


@pytest.mark.parametrize("how", ["serve", "launch", "fork"])
def test_only_a_forked_server_may_serve_just_one_connection(lab_dir: Path, how: str) -> None:
    """A launcher is no server, even if it runs the same program, such as Python."""
    with serving(lab_dir, how) as (starter, peer):
        assert (peer.pid == starter) is (how == "serve")
        assert peer.parent == (starter if how == "fork" else 0)


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.parametrize("how", ["spawn", "launch", "close"])
def test_a_program_that_is_started_for_one_connection(lab_dir: Path, how: str, family: str) -> None:
    """As inetd and sshd do. A server that no longer listens was not started by its launcher for the
    connection."""
    with serving(lab_dir, how, family) as (starter, peer):
        assert (peer.pid == starter) is (how == "close")
        assert peer.parent == (starter if how == "spawn" else 0)
