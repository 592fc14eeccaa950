"""The verdict on servers that also do work of their own, such as a backup job, for which no request
of the guest is the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.model.sample import Peer
from tests.pure.test_verdict import (
    IDLE,
    NBD,
    NO_IO,
    ON_MOUNT,
    SERVER,
    SHARED,
    UNIX,
    UNREAD,
    WRITING,
    S,
    follow,
    served,
)

UNSAMPLED = {"nodes": (NBD,), "sockets": (UNIX,)}
STUCK = replace(SERVER, pid=97, threads=(WRITING,))


def own_work(peer: Peer, second: int) -> Peer:
    io = replace(NO_IO, write_bytes=1_000_000 * second)
    return replace(peer, switches=5 * second, io=io)


@pytest.mark.parametrize(
    ("behind", "is_progress"),
    [
        # A server that is frozen, or whose call hangs, perhaps behind a relay
        (UNREAD, False),
        (STUCK, False),
        (replace(SERVER, pid=99, behind=(UNREAD,)), False),
        (replace(SERVER, pid=99, behind=(STUCK,)), False),
        # A server that has read all requests, or a process that need not be a server
        (replace(UNREAD, unread=0), True),
        (replace(UNREAD, certain=False), True),
        (replace(UNREAD, devices=()), True),
        # The call may be for another client
        (replace(STUCK, shared=True), True),
    ],
)
def test_work_of_a_proxy_may_be_its_own_while_a_server_behind_it_hangs(
    behind: Peer, is_progress: bool
) -> None:
    proxy = replace(SERVER, behind=(behind,))
    now = follow([replace(IDLE, at=s * S, **served(own_work(proxy, s))) for s in range(20)])
    assert (now.progress_at, now.doubt_at) == ((19 * S, None) if is_progress else (None, 19 * S))


def test_a_server_behind_that_runs_now_and_then_hides_no_progress() -> None:
    """The server behind is slow: it reads the next request every 3 s."""
    found = []
    for second in range(30):
        slow = replace(UNREAD, switches=second // 3)
        proxy = own_work(replace(SERVER, behind=(slow,)), second)
        found.append(replace(IDLE, at=second * S, **served(proxy)))
    assert follow(found).progress_at == 27 * S


@pytest.mark.parametrize(
    "peer",
    [
        replace(SERVER, threads=(ON_MOUNT,)),
        replace(SERVER, behind=(UNREAD,)),
        replace(SERVER, behind=(STUCK,)),
    ],
)
@pytest.mark.parametrize("gap", ["server", "connections", "server behind"])
def test_a_sample_without_a_server_makes_its_own_work_no_progress(peer: Peer, gap: str) -> None:
    found = []
    for second in range(60):
        busy = own_work(peer, second)
        shown: dict[str, Any] = served(busy)
        if second % 10 == 9:
            if gap == "server":
                shown = UNSAMPLED
            elif gap == "connections":
                shown = {"nodes": (NBD,), "sockets": None}
            elif gap == "server behind" and peer.behind:
                shown = served(replace(busy, behind=(), behind_unknown=True))
        found.append(replace(IDLE, at=second * S, **shown))
    now = follow(found)
    assert now.progress_at is None
    assert now.doubt_at is not None


def test_after_a_sample_without_a_shared_server_calls_of_others_are_no_progress() -> None:
    """One of two calls on the image's storage hangs."""
    found = []
    for second in range(40):
        other = replace(ON_MOUNT, tid=92, switches=second)
        peer = replace(SHARED, threads=(ON_MOUNT, other), place=("0:9",))
        shown = UNSAMPLED if second % 10 == 9 else served(peer)
        found.append(replace(IDLE, at=second * S, **shown))
    now = follow(found)
    assert (now.progress_at, now.doubt_at) == (None, 38 * S)
