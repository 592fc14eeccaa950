"""The bytes that a server exchanges with its own servers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.evidence import peer_reader
from qkilld.evidence.fuse import FuseFinder
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.peers import ServerReader
from qkilld.evidence.sockets import SocketTable
from qkilld.evidence.storage import StorageTable
from qkilld.model.sample import Peer
from tests.evidence.test_peers import end_of
from tests.evidence.until import until
from tests.lab.netns import NetworkNamespace
from tests.lab.process import end, spawn

SERVER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
client = listener.accept()[0]
made = []
for line in sys.stdin:
    if line == "connect\\n":
        made.append(socket.create_connection(("127.0.0.1", int(sys.argv[2]))))
    else:
        made[-1].sendall(bytes(int(line)))
"""


@contextlib.contextmanager
def sampled(
    path: Path, port: int, start: Callable[[list[str]], subprocess.Popen[bytes]]
) -> Iterator[tuple[Callable[[str], None], Callable[[], Peer | None]]]:
    """Run a server whose own server has this TCP port. Yield functions that give the server a
    command and sample the server."""
    process = start([sys.executable, "-c", SERVER, str(path), str(port)])
    try:
        until(path.exists, bool)
        with (
            socket.socket(socket.AF_UNIX) as connection,
            contextlib.closing(ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader,
        ):
            until(lambda: connection.connect_ex(str(path)), lambda error: error == 0)
            inode = until(lambda: end_of(connection), bool)

            def say(line: str) -> None:
                assert process.stdin is not None
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()

            def sample() -> Peer | None:
                return reader.read({inode: None}, StorageTable(), SocketTable()).get(inode)

            until(sample, bool)
            yield say, sample
    finally:
        end(process)


def _start(argv: list[str]) -> subprocess.Popen[bytes]:
    return spawn(argv, stdin=subprocess.PIPE)


@pytest.fixture(autouse=True)
def _no_old_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_reader, "REFRESH_S", 0.0)


def test_bytes_of_connections_that_a_server_has_made(lab_dir: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        sampled(lab_dir / "s", listener.getsockname()[1], _start) as (say, sample),
    ):

        def exchanged(count: int, ended: int = 0) -> None:
            wanted = count, ended
            until(sample, lambda peer: peer and (peer.exchanged, peer.ended) == wanted)

        exchanged(0)
        say("connect")
        with listener.accept()[0]:
            # The first bytes may be a handshake, so count from the first sample on.
            for _ in range(2):
                exchanged(0)
            say("100000")
            exchanged(100_000)
        say("connect")
        say("5000")
        with listener.accept()[0] as second:
            assert second.recv(5000, socket.MSG_WAITALL) == bytes(5000)
            for _ in range(2):
                exchanged(100_000, 1)
            say("700")
            exchanged(100_700, 1)
            second.sendall(bytes(900))  # The server never reads them.
            for _ in range(5):
                exchanged(100_700, 1)


def test_connections_in_another_network_namespace_are_unknown(lab_dir: Path) -> None:
    """/proc/PID/net does not count bytes."""
    with NetworkNamespace() as namespace:
        listener = namespace.run(lambda: socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]

        def start(argv: list[str]) -> subprocess.Popen[bytes]:
            return namespace.run(lambda: _start(argv))

        with listener, sampled(lab_dir / "s", port, start) as (say, sample):
            say("connect")
            with listener.accept()[0] as accepted:
                say("5000")
                assert accepted.recv(5000, socket.MSG_WAITALL) == bytes(5000)
                for _ in range(3):
                    peer = sample()
                    assert peer is not None and peer.exchanged is None
