"""The verdict on NBD servers on unix sockets: only that QEMU and the server run shows replies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.ladder import JobFacts, kill_due
from qkilld.decision.verdict import assess
from qkilld.model.constants import Flag, Verdict
from qkilld.model.policy import Policy
from qkilld.model.sample import Node, Socket
from tests.pure.test_verdict import (
    IDLE,
    ISCSI,
    NBD,
    OF_ISCSI,
    QMP,
    SERVER,
    STRANGER,
    UNIX,
    WRITING,
    S,
    follow,
    served,
)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_reply_proves_what_its_server_did_before(first: int) -> None:
    """The server of an NBD disk wakes once a second, and answers every 3 s. Each answer wakes
    QEMU."""
    now = follow(
        [
            replace(
                IDLE,
                at=second * S,
                switches=100 + (second + first) // 3,
                **served(replace(SERVER, switches=1_000 + second)),
            )
            for second in range(60)
        ]
    )
    assert now.progress_at is not None
    assert now.last.at - now.progress_at < 7 * S


@pytest.mark.parametrize(
    ("seconds", "special", "expected"),
    [
        (range(0), {}, 9),
        # The server could not be sampled when QEMU ran.
        (range(9, 10), {"sockets": (UNIX,)}, 10),
        (range(9, 10), {"sockets": None}, 10),
        # At that time, the server was already in a call for the next request.
        (range(9, 10), served(replace(SERVER, threads=(WRITING,), switches=1_008)), 10),
        # The server's files were closed between two samples, so the count began again.
        (range(1, 5), served(replace(SERVER, switches=5_000)), 9),
    ],
)
def test_the_first_reply_is_progress(
    seconds: range, special: dict[str, Any], expected: int
) -> None:
    """The server sleeps for 9 s, and then writes a page. QEMU has slept since the stop."""
    found = [replace(IDLE, at=0, nodes=(NBD,), sockets=(UNIX,))]
    for second in range(1, 20):
        woken = second >= 9
        shown = served(replace(SERVER, switches=1_000 + 8 * woken))
        if second in seconds:
            shown |= special
        found.append(replace(IDLE, at=second * S, switches=100 + 2 * woken, **shown))
    assert follow(found).progress_at == expected * S


@pytest.mark.parametrize("lacking", [range(0), range(9, 10), range(9, 12)])
def test_a_reply_is_progress_even_if_the_count_begins_again_at_that_time(lacking: range) -> None:
    """The server's files were closed when QEMU ran. After that, the server works on the next
    request."""
    found = []
    for second in range(30):
        answered = second >= 9
        switches = 200 + (second > 14) if answered else 5_000
        shown = served(replace(SERVER, switches=switches))
        if second in lacking:
            shown = {"nodes": (NBD,), "sockets": (UNIX,)}
        found.append(replace(IDLE, at=second * S, switches=100 + 2 * answered, **shown))
    assert follow(found).progress_at == 15 * S


@pytest.mark.parametrize("unread", [range(0, 200, 8), range(3, 200, 2), range(1, 3)])
def test_unreadable_counts_of_qemu_prove_no_reply(unread: range) -> None:
    """QEMU never runs, and the server only repeats a request that fails."""
    found = [
        replace(
            IDLE,
            at=second * S,
            switches=None if second in unread else 100,
            **served(replace(SERVER, switches=1_000 + 5 * second)),
        )
        for second in range(200)
    ]
    now = follow(found)
    assert (now.progress_at, now.doubt_at is not None) == (None, True)


def test_a_reply_is_progress_even_if_the_count_of_qemu_is_unreadable_at_that_time() -> None:
    found = []
    for second in range(30):
        answered = second >= 9
        switches = None if 9 <= second < 12 else 100 + 2 * answered
        shown = served(replace(SERVER, switches=1_000 + 8 * answered))
        found.append(replace(IDLE, at=second * S, switches=switches, **shown))
    assert follow(found).progress_at == 12 * S


def test_work_of_a_server_without_a_reply_is_no_progress() -> None:
    """QEMU runs once, to handle a reply. After that, the server repeats a request that fails.
    Later, the server is not sampled for a while."""
    found = []
    for second in range(60):
        shown = served(replace(SERVER, switches=1_000 + 5 * second))
        if 20 <= second < 30:
            shown = {"nodes": (NBD,), "sockets": (UNIX,)}
        found.append(replace(IDLE, at=second * S, switches=100 + (second >= 5), **shown))
    assert follow(found).progress_at == 5 * S


@pytest.mark.parametrize("shared", [False, True, None])
def test_a_reply_is_progress_even_if_it_wakes_the_server_only_twice(shared: bool | None) -> None:
    """The server answers every 13 s, and may have an idle client besides QEMU."""
    found = []
    for second in range(60):
        woken = second // 13
        shown = served(replace(SERVER, switches=1_000 + 2 * woken, shared=shared))
        found.append(replace(IDLE, at=second * S, switches=100 + 2 * woken, **shown))
    assert follow(found).progress_at == 52 * S


@pytest.mark.parametrize("shared", [True, None])
def test_what_a_server_does_for_other_clients_is_no_progress(shared: bool | None) -> None:
    """QEMU gets one reply; then its request hangs, while the server works for others."""
    found = []
    for second in range(60):
        shown = served(replace(SERVER, switches=1_000 + 50 * second, shared=shared))
        found.append(replace(IDLE, at=second * S, switches=100 + (second >= 5), **shown))
    now = follow(found)
    assert (now.progress_at, now.doubt_at) == (5 * S, None)


LOST = replace(NBD, name="disk2")
OF_LOST = replace(UNIX, inode=16, node="disk3")
RUNS_ANYWAY: list[tuple[tuple[Node, ...], tuple[Socket, ...]]] = [
    # Keepalives
    ((ISCSI,), (OF_ISCSI,)),
    # Attempts to connect again; the server may be on another host
    ((LOST,), ()),
    # The same for one of two nodes with the same server
    ((replace(LOST, group="disk2"), replace(LOST, name="disk3", group="disk2")), (OF_LOST,)),
    # Attempts to connect again, and a monitor
    ((LOST,), (QMP,)),
    # Perhaps a client, or storage that was added later
    ((), (STRANGER,)),
]


@pytest.mark.parametrize("shared", [False, True, None])
@pytest.mark.parametrize(("nodes", "sockets"), RUNS_ANYWAY)
def test_a_qemu_that_runs_for_other_reasons_may_get_no_reply(
    shared: bool | None, nodes: tuple[Node, ...], sockets: tuple[Socket, ...]
) -> None:
    """The server only repeats a request that fails, and QEMU runs for something else."""
    found = []
    for second in range(60):
        peer = replace(SERVER, switches=1_000 + 2 * second, shared=shared)
        sample = replace(IDLE, at=second * S, switches=100 + second)
        all_sockets = (replace(UNIX, peer=peer), *sockets)
        found.append(replace(sample, nodes=(NBD, *nodes), sockets=all_sockets))
    now = follow(found)
    assert (now.verdict, now.progress_at) == (Verdict.UNKNOWN, None)
    assert now.doubt_at is not None and now.doubt_at > 50 * S


RUNS_ONLY_FOR_REPLIES: list[tuple[tuple[Node, ...], tuple[Socket, ...]]] = [
    # The data connection of an emulated TPM
    ((), (Socket(98, "unix", client=False, send_queue=0, receive_queue=0),)),
    # A CD on a web server that has closed the idle connection
    ((Node("cd", "https", read_only=True),), ()),
    # A network device whose backend has ended
    ((Node("net (vhost-user-net)", "vhost-user"),), ()),
]


@pytest.mark.parametrize(("nodes", "sockets"), RUNS_ONLY_FOR_REPLIES)
def test_connections_that_do_not_wake_qemu_make_no_reply_doubtful(
    nodes: tuple[Node, ...], sockets: tuple[Socket, ...]
) -> None:
    """The server answers every 13 s."""
    now = None
    for second in range(1, 900):
        replies = second // 13
        peer = replace(SERVER, switches=1_000 + 6 * replies)
        sample = replace(IDLE, at=second * S, switches=100 + 2 * replies)
        all_sockets = (replace(UNIX, peer=peer), *sockets)
        now = assess(now, replace(sample, nodes=(NBD, *nodes), sockets=all_sockets))
        facts = JobFacts(flags=Flag.FORCE, policy=Policy(), started=S, term_at=S, assessment=now)
        assert kill_due(facts) > now.last.at
        assert now.progress_at == (replies * 13 * S or None)


def test_a_client_that_qemu_accepted_may_wake_it() -> None:
    """Perhaps an export of QEMU serves this client."""
    client = Socket(98, "unix", client=False, send_queue=0, receive_queue=0, accepted=True)
    found = []
    for second in range(10):
        peer = replace(SERVER, switches=1_000 + 2 * second)
        sample = replace(IDLE, at=second * S, switches=100 + second, nodes=(NBD,))
        found.append(replace(sample, sockets=(replace(UNIX, peer=peer), client)))
    assert (follow(found).progress_at, follow(found).doubt_at) == (None, 9 * S)


def test_nodes_with_the_same_server_are_all_connected() -> None:
    """It is unknown which connection belongs to which node, so one node seems to have both."""
    nodes = (replace(NBD, group="disk1"), replace(LOST, group="disk1"))
    found = []
    for second in range(10):
        peer = replace(SERVER, switches=1_000 + 2 * second)
        sockets = (replace(UNIX, peer=peer), replace(UNIX, inode=97, peer=peer))
        sample = replace(IDLE, at=second * S, switches=100 + second)
        found.append(replace(sample, nodes=nodes, sockets=sockets))
    assert follow(found).progress_at == 9 * S


def test_if_it_is_unknown_whether_qemu_has_run_there_may_be_no_reply() -> None:
    found = [
        replace(IDLE, at=second * S, switches=None, **served(replace(SERVER, switches=9 * second)))
        for second in range(10)
    ]
    assert (follow(found).progress_at, follow(found).doubt_at) == (None, 9 * S)
