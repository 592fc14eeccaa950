"""Which connections are cut off, and when."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from qkilld.decision.ladder import Action, JobFacts, decide
from qkilld.decision.verdict import Assessment, assess
from qkilld.decision.yank import choose
from qkilld.model.block_state import NetworkDisk, NetworkStorage, YankInstance
from qkilld.model.constants import Flag
from qkilld.model.policy import Policy
from qkilld.model.sample import Node, Peer, Sample, Socket, Thread
from tests.engine.conftest import IDLE, S
from tests.pure.test_verdict import HUNG, QUIET, SERVER, STUCK_SERVER

DEAD, WELL = Node("dead", "nbd", served=True), Node("well", "nbd", served=True)
TERM = 100 * S
FSYNC = Thread(1, "worker", "D", 74, True, "folio_wait_bit", "fsync", 3, "disk", ("8:0",))


def node(name: str) -> YankInstance:
    return YankInstance("block-node", name, {"type": "block-node", "node-name": name})


def chardev(name: str) -> YankInstance:
    return YankInstance("chardev", name, {"type": "chardev", "id": name})


def link(name: str, queue: int = 0, unacked: int = 0, inode: int = 1) -> Socket:
    family = "tcp" if unacked else "unix"
    return Socket(inode, family, True, queue, 0, unacked, role="storage", node=name)


def seen(*samples: Sample) -> Assessment:
    found = None
    for at, sample in enumerate(samples):
        found = assess(found, replace(sample, at=TERM + at * S))
    assert found is not None
    return found


def still(sample: Sample, seconds: int = 70) -> Assessment:
    return seen(*[sample] * seconds)


def chosen(
    evidence: Assessment, *instances: YankInstance, cut_off: Collection[str] = (), **more: object
) -> list[str]:
    known = NetworkStorage(**more)  # type: ignore[arg-type]
    cuts = choose(instances, evidence, known=known, cut_off=cut_off, still_since=TERM + S)
    return [cut.instance.name for cut in cuts]


def with_nodes(*sockets: Socket, nodes: tuple[Node, ...] = (DEAD, WELL)) -> Sample:
    return replace(IDLE, nodes=nodes, sockets=sockets)


def test_connections_that_owe_a_reply_are_cut_off_first() -> None:
    evidence = still(with_nodes(link("dead", queue=67_840), link("well", inode=2)))
    assert chosen(evidence, node("dead"), node("well")) == ["dead"]
    assert chosen(evidence, node("dead"), node("well"), cut_off={"dead"}) == ["well"]


def test_after_useless_samples_the_last_usable_one_counts() -> None:
    """On a busy host, there was no usable sample for StorageStallSec=."""
    evidence = still(with_nodes(link("dead", queue=67_840), link("well", inode=2)))
    evidence = assess(evidence, Sample(evidence.last.at + S, "?"))
    assert chosen(evidence, node("dead"), node("well")) == ["dead"]


@pytest.mark.parametrize(
    "server",
    [
        replace(SERVER, unread=28),
        STUCK_SERVER,
        replace(SERVER, behind=(replace(SERVER, pid=97, unread=28),)),
    ],
    ids=["frozen", "its disk", "behind a proxy"],
)
def test_a_server_that_has_a_request_is_cut_off_first(server: Peer) -> None:
    """All bytes are acknowledged. For a server on this host, the kernel itself does that."""
    dead = replace(link("dead"), peer=server)
    evidence = still(with_nodes(dead, replace(link("well", inode=2), peer=SERVER)))
    assert chosen(evidence, node("dead"), node("well")) == ["dead"]


def test_a_server_that_works_may_do_so_for_another_disk() -> None:
    works = replace(link("well", inode=2), peer=STUCK_SERVER)
    evidence = still(with_nodes(link("dead", unacked=100), works))
    assert chosen(evidence, node("dead"), node("well")) == ["dead"]
    assert chosen(evidence, node("dead"), node("well"), cut_off={"dead"}) == ["well"]


@pytest.mark.parametrize("server", [STUCK_SERVER, SERVER], ids=["works", "still"])
def test_possible_asynchronous_requests_keep_no_connection(server: Peer) -> None:
    """The kernel does not show whether asynchronous requests are in flight, so with aio=native,
    there may always be some. Only a stuck disk shows that QEMU waits for it."""
    sample = replace(
        with_nodes(replace(link("dead"), peer=server), nodes=(DEAD,)),
        direct=True,
        devices=(QUIET,),
    )
    assert chosen(still(sample), node("dead")) == ["dead"]
    assert chosen(still(replace(sample, devices=(HUNG,))), node("dead")) == []


def test_a_client_of_the_monitor_of_a_server_owes_nothing() -> None:
    client = replace(SERVER, pid=98, devices=(), unread=512)
    busy = replace(link("dead"), peer=STUCK_SERVER)
    idle = replace(link("well", inode=2), peer=replace(SERVER, behind=(client,)))
    assert chosen(still(with_nodes(busy, idle)), node("dead"), node("well")) == ["dead"]


def test_a_lost_server_and_one_that_did_not_answer_before_sigterm_come_first() -> None:
    lost = still(with_nodes(link("well", inode=2)))
    assert chosen(lost, node("dead"), node("well")) == ["dead"]
    silent = still(with_nodes(link("dead"), link("well", inode=2)))
    assert chosen(silent, node("dead"), node("well"), stuck=("dead",)) == ["dead"]
    assert chosen(silent, node("dead"), node("well")) == ["dead", "well"]


def test_a_slow_server_that_may_have_answered_since_is_not_cut_off_with_a_dead_one() -> None:
    samples = []
    for second in range(130):
        well = link("well", inode=2)
        well = replace(well, family="tcp", acked=900, received=500 if second < 5 else 516)
        samples.append(with_nodes(link("dead", queue=9), well))
    evidence = seen(*samples)
    known = NetworkStorage(stuck=("well",))
    for cut_off, expected in ((set[str](), "dead"), ({"dead"}, "well")):
        cuts = choose(
            (node("dead"), node("well")),
            evidence,
            known=known,
            cut_off=cut_off,
            still_since=TERM + 60 * S,
        )
        assert [cut.instance.name for cut in cuts] == [expected]


def test_a_moving_connection_is_not_cut_off() -> None:
    moving = [
        with_nodes(link("dead"), replace(link("well", inode=2), family="tcp", acked=at, received=8))
        for at in range(70)
    ]
    assert chosen(seen(*moving), node("dead"), node("well")) == ["dead"]


def test_a_server_that_may_have_replied_is_cut_off_last() -> None:
    """QEMU also runs for its iSCSI disk, so it is doubtful whether the server has replied."""
    lun = replace(link("lun", inode=3), family="tcp", acked=9_000, received=9_000)
    nodes = (DEAD, WELL, Node("lun", "iscsi"))
    samples = []
    for at in range(70):
        well = replace(link("well", inode=2), peer=replace(SERVER, switches=1_000 + at))
        sample = with_nodes(link("dead"), well, lun, nodes=nodes)
        samples.append(replace(sample, switches=100 + at))
    evidence = seen(*samples)
    assert chosen(evidence, node("dead"), node("well")) == ["dead"]
    assert chosen(evidence, node("dead"), node("well"), cut_off={"dead"}) == ["well"]


def test_an_idle_server_is_left_alone_while_a_local_disk_is_stuck() -> None:
    evidence = still(replace(with_nodes(link("well"), nodes=(WELL,)), threads=(FSYNC,)))
    assert chosen(evidence, node("well")) == []


def test_a_timer_is_no_request_to_a_local_disk() -> None:
    evidence = still(replace(with_nodes(link("well"), nodes=(WELL,)), rings=1, timers=1))
    assert chosen(evidence, node("well")) == ["well"]
    evidence = still(replace(with_nodes(link("well"), nodes=(WELL,)), rings=2, timers=1))
    assert chosen(evidence, node("well")) == []


def test_names_of_drives_are_matched_by_the_disks_that_were_seen() -> None:
    evidence = still(with_nodes(link("dead", queue=9), link("well", inode=2)))
    disks = (NetworkDisk("dead", ("#block1",)), NetworkDisk("well", ("#block2",)))
    assert chosen(evidence, node("#block1"), node("#block2"), disks=disks) == ["#block1"]


def test_an_unknown_node_is_cut_off_only_if_no_connection_moves() -> None:
    evidence = still(with_nodes(link("dead"), nodes=(DEAD,)))
    assert chosen(evidence, node("plugged")) == ["plugged"]
    moving = [
        with_nodes(replace(link("dead"), family="tcp", acked=at, received=8), nodes=(DEAD,))
        for at in range(70)
    ]
    assert chosen(seen(*moving), node("plugged")) == []


def test_other_character_devices_are_never_cut_off() -> None:
    back = Node("back (vhost-user-blk)", "vhost-user")
    evidence = still(with_nodes(link(back.name, queue=5), nodes=(back,)))
    assert chosen(evidence, chardev("serial0"), chardev("back")) == ["back"]
    migration = YankInstance("migration", "", {"type": "migration"})
    assert chosen(evidence, migration) == []


A, B = Node("a", "nbd", group="a"), Node("b", "nbd", group="a")
"""Nodes with the same server. All connections carry the name of one of them."""


@pytest.mark.parametrize(
    ("sockets", "more", "expected"),
    [
        # Both are healthy.
        ((link("b"), link("b", inode=2)), (link("dead", unacked=2, inode=3),), ["dead"]),
        ((link("b"), link("b", inode=2)), (), ["dead"]),
        # One of them lacks a reply, but it is unknown which.
        ((link("b"), link("b", 28, inode=2)), (), ["dead"]),
        ((link("b"),), (), ["dead"]),
        # Both lack a reply.
        ((link("b", 28), link("b", 28, inode=2)), (), ["a", "b", "dead"]),
        ((link("b", 28),), (), ["a", "b", "dead"]),
        ((), (), ["a", "b", "dead"]),
    ],
)
def test_nodes_with_one_server_beside_a_dead_one(
    sockets: tuple[Socket, ...], more: tuple[Socket, ...], expected: list[str]
) -> None:
    evidence = still(with_nodes(*sockets, *more, nodes=(A, B, DEAD)))
    assert chosen(evidence, node("a"), node("b"), node("dead")) == expected


@pytest.mark.parametrize(
    ("sockets", "expected"),
    [
        ((link("b"), link("b", inode=2)), []),
        ((link("b"), link("b", 28, inode=2)), ["a", "b"]),
        ((link("b"),), ["a", "b"]),
    ],
)
def test_nodes_with_one_server_beside_a_stuck_local_disk(
    sockets: tuple[Socket, ...], expected: list[str]
) -> None:
    evidence = still(replace(with_nodes(*sockets, nodes=(A, B)), threads=(FSYNC,)))
    assert chosen(evidence, node("a"), node("b")) == expected


def test_a_connection_that_was_cut_off_does_not_make_the_others_of_its_group_suspect() -> None:
    evidence = still(replace(with_nodes(link("b"), nodes=(A, B)), threads=(FSYNC,)))
    assert chosen(evidence, node("a"), node("b"), cut_off={"a"}) == []
    # QEMU has closed one of the nodes.
    assert chosen(evidence, node("b")) == []
    evidence = still(with_nodes(link("b"), link("b", inode=2), nodes=(A, B)))
    assert chosen(evidence, node("a"), node("b"), stuck=("b",)) == ["b"]


def test_nodes_with_one_server_move_together() -> None:
    """It is unknown which of the two gets replies."""
    moving = [
        with_nodes(
            link("b", 28),
            replace(link("b", inode=2), family="tcp", acked=at, received=8),
            nodes=(A, B),
        )
        for at in range(70)
    ]
    assert chosen(seen(*moving), node("a"), node("b")) == []


def facts(evidence: Assessment, **changes: object) -> JobFacts:
    found = JobFacts(
        flags=Flag.FORCE,
        policy=Policy(),
        started=TERM,
        term_at=TERM,
        assessment=evidence,
        may_yank=True,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


STILL = still(with_nodes(link("dead", queue=9), nodes=(DEAD,)), 61)


def test_it_comes_where_sigkill_would_and_starts_the_windows_again() -> None:
    now = STILL.last.at
    assert decide(facts(STILL), now - S).action is not Action.YANK
    assert decide(facts(STILL), now).action is Action.YANK
    assert decide(facts(STILL, may_yank=False), now).action is Action.KILL
    after = decide(facts(STILL, yank_at=now), now + S)
    assert after.action in (Action.WAIT, Action.SAMPLE)
    assert after.deadline >= now + 60 * S


def test_never_without_force_nor_when_max_sec_is_over() -> None:
    now = STILL.last.at
    assert decide(facts(STILL, flags=Flag(0)), now + 6 * S).action is not Action.YANK
    limited = facts(STILL, policy=replace(Policy(), max=now - TERM))
    assert decide(limited, now).action is Action.KILL


def test_never_for_a_process_that_waits_for_nothing() -> None:
    idle = still(IDLE, 12)
    assert decide(facts(idle), idle.last.at).action is Action.KILL


@pytest.mark.parametrize("stuck", [(), ("hot",)])
def test_an_added_disk_whose_connection_may_be_the_one_that_moves_is_not_cut_off(
    stuck: tuple[str, ...],
) -> None:
    """It had not answered before SIGTERM, but one connection of unknown use moves now."""

    def shown(second: int) -> Sample:
        moved = 4_000 * second
        hot = Socket(2, "tcp", True, 0, 0, 0, 30_000 + moved, 20_000 + moved, role="unknown")
        sockets = (link("dead", queue=700), hot)
        return replace(with_nodes(*sockets, nodes=(DEAD,)), pluggable=True)

    evidence = seen(*map(shown, range(70)))
    assert chosen(evidence, node("dead"), node("hot"), stuck=frozenset(stuck)) == ["dead"]


def test_a_busy_connection_does_not_protect_an_added_disk_that_had_not_answered() -> None:
    """There is another connection of unknown use, which does not move."""

    def shown(second: int) -> Sample:
        moved = 4_000 * second
        busy = Socket(2, "tcp", True, 0, 0, 0, 30_000 + moved, 20_000 + moved, role="unknown")
        hung = replace(busy, inode=3, send_queue=700, acked=30_000, received=20_000)
        return replace(with_nodes(busy, hung, nodes=()), pluggable=True)

    assert chosen(seen(*map(shown, range(70))), node("hot"), stuck=frozenset({"hot"})) == ["hot"]
