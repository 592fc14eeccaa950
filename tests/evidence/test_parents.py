"""The processes that start servers: for one connection, or for good."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.model.sample import Peer
from tests.evidence.test_peers import end_of, server_of
from tests.evidence.until import until
from tests.lab.process import end, spawn

_SERVER = """
import os, socket, subprocess, sys
how, path = sys.argv[1:]
if how == "launch":
    sys.exit(subprocess.call([sys.executable, __file__, "serve", path]))
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
open(path + ".ready", "w")
connection, _ = listener.accept()
if how == "fork" and (child := os.fork()):
    connection.close()
    os.waitpid(child, 0)
else:
    connection.recv(1)
"""


@contextlib.contextmanager
def serving(directory: Path, how: str) -> Iterator[tuple[int, Peer]]:
    """Yield a process that starts servers, and the server of our connection."""
    script, path = directory / "server.py", directory / "socket"
    script.write_text(_SERVER)
    starter = spawn([sys.executable, script, how, path])
    try:
        until(lambda: (directory / "socket.ready").exists(), bool)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            inode = until(lambda: end_of(connection), bool)
            alone = how == "serve"
            yield starter.pid, server_of(inode, lambda peer: alone or peer.pid != starter.pid)
    finally:
        end(starter)


@pytest.mark.parametrize("how", ["serve", "launch", "fork"])
def test_only_a_forked_server_may_serve_just_one_connection(lab_dir: Path, how: str) -> None:
    """A launcher is no server, even if it runs the same program, such as Python."""
    with serving(lab_dir, how) as (starter, peer):
        assert (peer.pid == starter) is (how == "serve")
        assert peer.parent == (starter if how == "fork" else 0)
