"""A server that breaks each connection. Data that is sent again is not progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from qkilld.decision.connections import BREAKS, LASTS, Connections
from qkilld.decision.verdict import Assessment, assess
from qkilld.model.constants import Verdict
from qkilld.model.sample import Peer, Socket
from tests.pure.test_verdict import IDLE, NBD, NO_IO, OF_NBD, UNIX, S

SERVER = Peer(90, "nbdkit", (), 1_000, NO_IO, (), shared=False)


def run(sockets: Iterable[Socket | None]) -> Assessment:
    """Judge the connection of a node, with one sample a second. None means no connection."""
    now = None
    for second, socket in enumerate(sockets):
        connected = () if socket is None else (socket,)
        now = assess(now, replace(IDLE, at=second * S, nodes=(NBD,), sockets=connected))
    assert now is not None
    return now


def unix(connection: int, second: int) -> Socket:
    """The server takes bytes, and its process runs."""
    server = replace(SERVER, switches=1_000 + 100 * connection + 10 * second)
    inode, queue = 100 + connection, 200_000 - 30_000 * second
    return replace(UNIX, inode=inode, send_queue=queue, peer=server)


def tcp(connection: int, second: int, received: int = 90) -> Socket:
    acked = 127_000 + 30_000 * second
    return replace(OF_NBD, inode=100 + connection, acked=acked, received=received)


@pytest.mark.parametrize("socket", [unix, tcp])
@pytest.mark.parametrize("gap", [True, False])
def test_the_same_bytes_on_each_connection(socket: type, gap: bool) -> None:
    sockets: list[Socket | None] = []
    for connection in range(30):
        sockets += [socket(connection, second) for second in range(4)]
        sockets += [None] if gap else []
    now = run(sockets)
    assert now.progress_at is not None
    assert now.progress_at <= (BREAKS + 1) * 5 * S
    assert now.doubt_at is not None
    assert now.doubt_at > 100 * S


def test_a_server_that_is_restarted_each_time() -> None:
    """The writes of each new process of the server do not count as progress."""
    sockets: list[Socket | None] = []
    for connection in range(30):
        for second in range(4):
            written = replace(NO_IO, write_bytes=second << 20)
            server = replace(SERVER, pid=200 + connection, io=written)
            sockets.append(replace(UNIX, inode=100 + connection, peer=server))
    now = run(sockets)
    assert now.progress_at is not None
    assert now.progress_at <= (BREAKS + 1) * 4 * S


def test_replies_are_progress_however_often_connections_break() -> None:
    sockets = [
        tcp(connection, second, 90 + 16 * second) for connection in range(30) for second in range(4)
    ]
    now = run(sockets)
    assert (now.verdict, now.progress_at) == (Verdict.FLUSHING, now.last.at)


def test_a_handshake_is_no_reply() -> None:
    """The server keeps each client waiting during the handshake, before any request."""
    sockets = []
    for connection in range(30):
        for second in range(4):
            early = replace(tcp(connection, 0, 20 + 20 * second), acked=4 + 10 * second)
            sockets.append(early)
    now = run(sockets)
    assert now.progress_at is not None
    assert now.progress_at <= (BREAKS + 1) * 4 * S


def test_a_connection_that_lasts_counts_again() -> None:
    """The server was down behind a proxy, which accepts connections and closes them."""
    broken = [unix(connection, 0) for connection in range(8)]
    lasting = [replace(unix(8, 0), send_queue=200_000 - second) for second in range(20)]
    now = run([*broken, *lasting])
    assert (now.verdict, now.progress_at) == (Verdict.FLUSHING, now.last.at)


def test_connections_that_break_ever_later_count_ever_more_rarely() -> None:
    known = Connections()
    at = 0
    for number in range(BREAKS + 2):
        for _ in range(11):
            known = known.follow(frozenset({number}), at)
            at += S
    assert (known.broken, known.longest) == (BREAKS + 1, 10 * S)
    assert known.repeats
    began = known.since
    while known.repeats:
        at += S
        known = known.follow(known.inodes, at)
    assert at - began == max(LASTS, 20 * S)
    known = known.follow(frozenset({99}), at + S)
    assert known.repeats
    assert known.longest == 20 * S
    assert not known.answered().repeats


def test_more_connections_of_a_node_break_none() -> None:
    known = Connections().follow(frozenset({1}), 0).follow(frozenset({1, 2}), S)
    assert known.broken == 0
    assert known.follow(frozenset(), 2 * S) == known
    assert known.follow(frozenset({2, 3}), 3 * S).broken == 1
