"""The data that is at risk because of the servers of a guest's network disks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.server_risks import (
    ServerEnds,
    needs_settling,
    risks_of_servers,
    risks_so_far,
)
from qkilld.decision.servers import MAX_LEFT, MAX_MOUNTS, StorageServers, follow_servers
from qkilld.model.sample import ImagePlace, Mount, Node, Peer, Sample, Socket

S = 1_000_000
NODE = Node("disk", "nbd")
LUN = Node("disk", "iscsi")
PEER = Peer(90, "nbdkit", (), None, None, ())
UNSURE = replace(PEER, leaves=True, behind_unknown=True)
UNIX = Socket(7, "unix", True, 0, 0, role="storage", node="disk", peer=PEER)
TCP = replace(UNIX, family="tcp", tcp_id="02")
FAR = replace(TCP, peer=None)
OF_FUSE = replace(PEER, pid=95, serves=("0:9",))
SHOWN = Sample(10 * S, "S", nodes=(NODE,), sockets=(UNIX,), pluggable=False)


def sample(*sockets: Socket, node: Node = NODE, **fields: Any) -> Sample:
    return replace(SHOWN, **{"nodes": (node,), "sockets": sockets, **fields})


def risk(shown: Sample | StorageServers, **ends: Any) -> str:
    servers = follow_servers(None, shown) if isinstance(shown, Sample) else shown
    times = {"guest_started": S, "guest_ended": 20 * S}
    risks = risks_of_servers(servers, ServerEnds(**{**times, **ends}))
    assert {one.code for one in risks} <= {"unknown"}
    return " ".join(one.text for one in risks)


ENDED: dict[str, Any] = {"before": frozenset({90})}
LATER: dict[str, Any] = {"after": frozenset({90})}
STOPPING: dict[str, Any] = {"stopping": frozenset({90})}
FIRST: dict[str, Any] = {"closed_first": {"disk": True}}
SECOND: dict[str, Any] = {"closed_first": {"disk": False}}


@pytest.mark.parametrize(
    ("shown", "ends", "text"),
    [
        (sample(UNIX), {}, ""),
        (sample(UNIX), {"before": frozenset({91})}, ""),
        (sample(UNIX), ENDED, "nbdkit (process 90) ended before the guest"),
        (sample(UNIX), LATER, "ended at almost the same time"),
        (sample(UNIX), STOPPING, "was being stopped"),
        # The kernel proves that the guest closed the connection first.
        (sample(TCP), {**FIRST, **ENDED}, ""),
        (sample(TCP), {**FIRST, **STOPPING}, ""),
        # If a server on this host closed the connection first, this proves nothing.
        (sample(TCP), SECOND, ""),
        (sample(TCP), {**SECOND, **ENDED}, "ended before the guest"),
        # The kernel was asked, but too busy to answer.
        (sample(FAR), {}, "is unknown"),
        (sample(replace(FAR, tcp_id="")), {}, ""),
        (sample(FAR, node=Node("disk", "iscsi")), {}, ""),
        (sample(FAR), FIRST, ""),
        (sample(FAR), SECOND, "closed the connection before the guest"),
        (sample(replace(UNIX, peer=None)), {}, "was not found"),
        # Servers behind the server count as the server itself.
        (sample(replace(UNIX, peer=UNSURE)), {}, "not all servers that its server nbdkit"),
        (sample(replace(UNIX, peer=replace(PEER, behind=(UNSURE,)))), {}, "not all servers"),
        (sample(replace(TCP, peer=replace(PEER, behind=(UNSURE,)))), FIRST, "not all servers"),
        (sample(replace(UNIX, peer=replace(PEER, behind=(replace(PEER, pid=91),)))), {}, ""),
    ],
)
def test_a_server_that_was_connected(shown: Sample, ends: dict[str, Any], text: str) -> None:
    found = risk(shown, **ends)
    assert (text in found) if text else (found == "")


@pytest.mark.parametrize(
    ("peer", "pid", "is_risk"),
    [
        # The server exits because the guest disconnects.
        (replace(PEER, leaves=True), 90, False),
        # A process that was forked for the connection exits, too. But its parent should remain.
        (replace(PEER, parent=80), 90, False),
        (replace(PEER, parent=80), 80, True),
        # A proxy, and the server behind it.
        (replace(PEER, leaves=True, behind=(replace(PEER, pid=95),)), 90, False),
        (replace(PEER, leaves=True, behind=(replace(PEER, pid=95),)), 95, True),
        # The server has its files on FUSE. The FUSE server is known for certain only in the first
        # case.
        (replace(PEER, behind=(OF_FUSE,)), 95, True),
        (replace(PEER, behind=(replace(OF_FUSE, certain=False),)), 95, False),
    ],
)
def test_whose_end_counts(peer: Peer, pid: int, is_risk: bool) -> None:
    shown = sample(replace(UNIX, peer=peer))
    assert bool(risk(shown, before=frozenset({pid}))) is is_risk
    # A server that exits with its client is a risk, too, if it is stopped: it then closes its
    # connections early.
    assert risk(shown, stopping=frozenset({90}))


@pytest.mark.parametrize(
    "node", [replace(NODE, read_only=True), replace(NODE, protocol="vhost-user")]
)
def test_a_node_for_which_qemu_holds_no_data(node: Node) -> None:
    assert risk(sample(UNIX, node=node), **ENDED) == ""
    assert risk(sample(node=replace(node, served=False))) == ""


@pytest.mark.parametrize(
    ("shown", "is_risk"),
    [
        (sample(), True),
        # A monitor may have closed the node, but a proxy may have closed its connection.
        (sample(pluggable=True), True),
        (sample(node=replace(NODE, served=True), pluggable=True), True),
        # A connection of unknown use may be that of the node.
        (sample(replace(UNIX, node="", role="unknown")), False),
        (sample(replace(UNIX, node="")), False),
        (sample(replace(UNIX, node="", role="other")), True),
        (sample(node=replace(NODE, served=False), pluggable=True), True),
        # The command line does not name the server.
        (sample(node=Node("disk", "rbd")), False),
        (sample(node=Node("disk", "iscsi", served=False)), True),
    ],
)
def test_a_node_without_a_connection_before_sigterm(shown: Sample, is_risk: bool) -> None:
    assert bool(risk(shown)) is is_risk


@pytest.mark.parametrize(("ended", "is_risk"), [(39 * S, False), (40 * S, True)])
def test_qemu_keeps_data_until_the_reconnect_delay_is_over(ended: int, is_risk: bool) -> None:
    shown = sample(UNIX, node=replace(NODE, reconnect=30))
    assert bool(risk(shown, guest_ended=ended, **LATER)) is is_risk
    # The time of the loss is unknown, but it was after the guest's start.
    lost = sample(node=replace(NODE, reconnect=30))
    assert bool(risk(lost, guest_ended=ended, guest_started=10 * S)) is is_risk


def test_unread_connections_are_a_risk() -> None:
    assert follow_servers(None, replace(SHOWN, sockets=None)) is None
    assert follow_servers(None, replace(SHOWN, nodes=None)) is None
    assert [one.code for one in risks_of_servers(None, ServerEnds(guest_started=0, guest_ended=1))]


def test_connections_are_followed() -> None:
    first = follow_servers(None, sample())
    assert first is not None and first.disconnected == (NODE,)
    late = follow_servers(first, sample(replace(UNIX, peer=None)))
    assert late is not None and late.disconnected == () and late.unfound
    found = follow_servers(late, sample(UNIX, at=11 * S))
    assert found is not None and not found.unfound and found.lasting == {90}
    assert found.connected["disk"].at == 10 * S
    # These samples change nothing: an exiting QEMU has closed the connection, and a sample without
    # detail does not read servers.
    assert follow_servers(found, sample()) == found
    assert follow_servers(found, sample(replace(UNIX, peer=None))) == found
    assert follow_servers(found, replace(SHOWN, sockets=None)) == found
    other = follow_servers(found, sample(replace(UNIX, inode=8, peer=replace(PEER, pid=91))))
    assert other is not None and other.connected["disk"].lasting == {91}


A, B = replace(NODE, name="a", group="a"), replace(NODE, name="b", group="a")
FIRST_OF_A = replace(UNIX, node="a")
SECOND_OF_A = replace(UNIX, node="a", inode=8)


def test_two_nodes_with_one_server() -> None:
    """The nodes cannot be told apart by the command line, so both connections have the name of one
    node."""
    both = replace(SHOWN, nodes=(A, B), sockets=(FIRST_OF_A, SECOND_OF_A))
    servers = follow_servers(None, both)
    assert servers is not None
    assert {name: one.inode for name, one in servers.connected.items()} == {"a": 7, "b": 8}
    assert risk(servers) == ""
    assert follow_servers(servers, both) == servers
    text = risk(servers, **ENDED)
    assert text.count("nodes a, b") == 1 and "ended before the guest" in text
    # A new connection takes the place of the lost one.
    other = replace(both, sockets=(SECOND_OF_A, replace(FIRST_OF_A, inode=9)))
    servers = follow_servers(servers, other)
    assert servers is not None
    assert {name: one.inode for name, one in servers.connected.items()} == {"a": 9, "b": 8}


@pytest.mark.parametrize(
    ("nodes", "is_known", "is_risk"),
    [
        ((A, B), True, True),
        ((A, B), False, False),
        # It is unknown which of the nodes is connected.
        ((replace(A, read_only=True), B), True, True),
        ((replace(A, reconnect=30), B), True, True),
        ((replace(A, reconnect=30), replace(B, reconnect=30)), True, False),
        ((replace(A, read_only=True), replace(B, read_only=True)), True, False),
    ],
)
def test_one_connection_for_two_nodes(
    nodes: tuple[Node, ...], is_known: bool, is_risk: bool
) -> None:
    other = replace(UNIX, inode=9, node="", role="other" if is_known else "unknown")
    shown = replace(SHOWN, nodes=nodes, sockets=(FIRST_OF_A, other))
    assert ("one of the nbd nodes a, b had no" in risk(shown)) is is_risk


def test_the_connection_of_any_node_of_a_group_counts() -> None:
    """The connection with the name of the read-only node may belong to the other node."""
    nodes = (replace(A, read_only=True), B)
    shown = replace(SHOWN, nodes=nodes, sockets=(FIRST_OF_A, SECOND_OF_A))
    assert risk(shown) == ""
    assert risk(replace(shown, sockets=(FIRST_OF_A, replace(SECOND_OF_A, peer=None))))


def test_the_connections_of_nodes_that_lose_nothing_need_not_be_read() -> None:
    node = replace(NODE, read_only=True)
    assert follow_servers(None, sample(node=node, sockets=None)) == StorageServers()
    assert follow_servers(None, replace(SHOWN, nodes=(), sockets=None)) == StorageServers()


def test_whether_a_server_exits_with_its_client_may_be_known_late() -> None:
    slow = replace(PEER, leaves=None)
    first = follow_servers(None, sample(replace(UNIX, peer=slow)))
    assert first is not None and first.unfound and first.lasting == {90}
    behind = replace(PEER, leaves=True, behind=(replace(PEER, pid=95, leaves=None),))
    second = follow_servers(first, sample(replace(TCP, peer=behind)))
    assert second is not None and second.unfound
    found = follow_servers(first, sample(replace(UNIX, peer=replace(PEER, leaves=True))))
    assert found is not None and not found.unfound and found.lasting == set()
    assert follow_servers(found, sample(replace(UNIX, peer=slow))) == found


SELF = "02" + "a1b22a39" + ("7f000001" + "00" * 12) * 2 + "00" * 12
OTHER = "02" + "a1b22a39" + ("7f000001" + "00" * 12) + ("7f000002" + "00" * 12) + "00" * 12


@pytest.mark.parametrize(
    ("tcp_id", "protocol", "is_here"),
    [(SELF, "nbd", True), (OTHER, "nbd", False), ("", "nbd", False), (SELF, "iscsi", False)],
)
def test_a_server_on_tcp_that_is_on_this_host(tcp_id: str, protocol: str, is_here: bool) -> None:
    node = replace(NODE, protocol=protocol)
    shown = sample(replace(FAR, tcp_id=tcp_id), node=node)
    servers = follow_servers(None, shown)
    assert servers is not None and servers.unfound is is_here
    assert ("was not found" in risk(shown, **SECOND)) is is_here


def test_a_server_behind_the_server_may_be_found_late() -> None:
    proxy = replace(PEER, leaves=True, behind_unknown=True)
    servers = follow_servers(None, sample(replace(UNIX, peer=proxy)))
    assert servers is not None and servers.unfound
    whole = replace(proxy, behind=(replace(PEER, pid=95),), behind_unknown=False)
    servers = follow_servers(servers, sample(replace(UNIX, peer=whole)))
    assert servers is not None and not servers.unfound
    assert "ended before the guest" in risk(servers, before=frozenset({95}))


@pytest.mark.parametrize(
    "peer",
    [
        replace(PEER, behind_unknown=True),
        replace(PEER, behind=(replace(PEER, pid=95),)),
        replace(PEER, behind=(replace(OF_FUSE, certain=False),)),
    ],
)
def test_who_closed_the_connection_says_nothing_of_a_server_behind(peer: Peer) -> None:
    shown = sample(replace(TCP, peer=peer))
    assert "ended before the guest" in risk(shown, **FIRST, **ENDED)
    assert needs_settling(follow_servers(None, shown), FIRST["closed_first"])


def test_only_a_lasting_server_without_proof_takes_time() -> None:
    assert needs_settling(follow_servers(None, sample(UNIX)), {})
    assert needs_settling(follow_servers(None, sample(TCP)), {"disk": False})
    assert not needs_settling(follow_servers(None, sample(TCP)), {"disk": True})
    leaving = sample(replace(UNIX, peer=replace(PEER, leaves=True)))
    assert not needs_settling(follow_servers(None, leaving), {})
    assert not needs_settling(follow_servers(None, sample(FAR)), {})
    assert not needs_settling(None, {})


def test_servers_that_share_those_behind_them_take_little_time() -> None:
    """The event loop judges these servers at each sample."""
    last = tuple(replace(PEER, pid=200 + number) for number in range(30))
    middle = tuple(replace(PEER, pid=100 + number, behind=last) for number in range(30))
    first = replace(PEER, behind=middle)
    nodes = tuple(Node(f"n{number}", "nbd") for number in range(256))
    sockets = [replace(UNIX, inode=i, node=node.name, peer=first) for i, node in enumerate(nodes)]
    servers = follow_servers(None, sample(*sockets, nodes=nodes))
    assert servers is not None
    start = time.thread_time()
    assert len(servers.lasting) == len(servers.serving) == 61
    assert not servers.unfound
    assert time.thread_time() - start < 0.05


def test_many_connections_to_the_server_of_many_nodes_take_little_time() -> None:
    nodes = tuple(Node(f"n{number}", "nbd", group="n0") for number in range(256))
    shown = sample(*(replace(UNIX, inode=i, node="n255") for i in range(4000)), nodes=nodes)
    servers = follow_servers(None, shown)
    start = time.thread_time()
    servers = follow_servers(servers, shown)
    assert time.thread_time() - start < 0.02
    assert servers is not None
    assert servers.connected.keys() == {node.name for node in nodes}


@pytest.mark.parametrize(
    ("later", "is_risk"),
    [
        ([sample(node=replace(LUN, served=False))], True),
        ([sample(node=LUN), sample(node=replace(LUN, served=False))], True),
        # A server listens again, so it was QEMU that closed the connection.
        ([sample(node=replace(LUN, served=True))], False),
        (
            [sample(node=replace(LUN, served=True)), sample(node=replace(LUN, served=False))],
            False,
        ),
        ([sample(node=LUN)], False),
        ([sample(UNIX, node=LUN), sample(node=replace(LUN, served=False))], False),
    ],
)
def test_whether_a_server_listens_may_be_known_late(later: list[Sample], is_risk: bool) -> None:
    """A sample without detail does not search for servers."""
    servers = None
    for shown in (sample(node=LUN), *later):
        servers = follow_servers(servers, shown)
    assert servers is not None
    assert bool(risk(servers)) is is_risk


def test_qemu_may_have_closed_the_connection_of_unknown_use() -> None:
    servers = follow(sample(replace(UNIX, node="", role="unknown")), sample())
    assert servers.unchecked == (NODE,) and risk(servers) == ""


def test_guests_without_network_disks_share_one_object() -> None:
    no_disks = replace(SHOWN, nodes=(), sockets=())
    servers = follow_servers(None, no_disks)
    assert servers == StorageServers()
    assert follow_servers(None, no_disks) is servers
    assert follow_servers(servers, no_disks) is servers
    later = follow_servers(servers, sample(UNIX))
    assert later is not None
    assert later.connected
    assert follow_servers(None, no_disks) == StorageServers()


KEPT = replace(NODE, reconnect=1 << 20)
NEW = replace(UNIX, inode=8, peer=replace(PEER, pid=91))
LOST = "lost its server nbdkit (process 90) during the stop; data that it had acknowledged"


def follow(*samples: Sample) -> StorageServers:
    servers = None
    for shown in samples:
        servers = follow_servers(servers, shown)
    assert servers is not None
    return servers


def early(servers: StorageServers, *young: int, ended: int = 0) -> str:
    closed = replace(SHOWN, nodes=(), sockets=())
    risks = risks_so_far(servers, frozenset(young), frozenset({ended}), closed)
    return " ".join(one.text for one in risks)


def test_qemu_keeps_no_data_that_an_ended_server_has_acknowledged() -> None:
    """However long QEMU keeps its unanswered requests."""
    assert "nbdkit (process 90) ended before the guest" in risk(sample(UNIX, node=KEPT), **ENDED)
    assert risk(sample(replace(TCP, peer=PEER), node=KEPT), **ENDED, **FIRST) == ""
    assert "was not found" in risk(sample(replace(UNIX, peer=None), node=KEPT))
    assert "not all servers" in risk(sample(replace(UNIX, peer=UNSURE), node=KEPT))


@pytest.mark.parametrize("node", [NODE, KEPT])
def test_a_server_that_was_replaced(node: Node) -> None:
    servers = follow(sample(UNIX, node=node), sample(node=node), sample(NEW, node=node))
    assert LOST in early(servers, ended=90) and LOST in risk(servers, **ENDED)
    # It may have been killed, but not have ended yet.
    assert LOST in risk(servers, **LATER) and LOST in risk(servers, **STOPPING)


def test_a_server_that_was_replaced_but_still_runs() -> None:
    """Another server was chosen for a new connection, but the old one still has all the data."""

    def behind(pid: int) -> Sample:
        peer = replace(PEER, pid=80, behind=(replace(PEER, pid=pid),))
        return sample(replace(UNIX, peer=peer))

    node = Node("disk", "rbd")
    two = sample(UNIX, NEW, node=node)
    for servers in (
        follow(sample(UNIX), sample(NEW)),
        follow(behind(90), behind(91)),
        follow(two, sample(NEW, node=node)),
    ):
        assert 90 in servers.lasting and needs_settling(servers, FIRST["closed_first"])
        assert early(servers) == early(servers, 91) == risk(servers) == ""
        assert "process 90)" in early(servers, ended=90) and "process 90)" in risk(servers, **ENDED)


def test_the_guest_closed_the_new_connection_to_the_same_server_first() -> None:
    shown = replace(TCP, peer=PEER)
    servers = follow(sample(shown), sample(replace(shown, inode=8)))
    assert risk(servers, **ENDED, **FIRST) == ""


def test_a_server_that_leaves_with_its_client_was_replaced() -> None:
    """Its client has not ended, so the server did not leave because of that."""
    leaving = replace(UNIX, peer=replace(PEER, leaves=True))
    other = replace(NEW, peer=replace(PEER, pid=91, leaves=True))
    assert LOST in risk(follow(sample(leaving), sample(other)), **ENDED)


def test_a_new_connection_to_the_same_server_is_no_risk() -> None:
    servers = follow(sample(UNIX, node=KEPT), sample(replace(UNIX, inode=8), node=KEPT))
    assert early(servers) == risk(servers) == ""


def test_a_replaced_server_is_known_when_the_new_one_is() -> None:
    unfound = replace(NEW, peer=None)
    servers = follow(sample(UNIX), sample(unfound))
    assert early(servers) == "" and LOST in risk(servers, **ENDED)
    assert "was not found" in risk(servers)
    assert LOST in early(follow(sample(UNIX), sample(unfound), sample(NEW)), ended=90)
    again = follow(sample(UNIX), sample(unfound), sample(replace(UNIX, inode=8)))
    assert early(again) == risk(again) == ""


def test_a_server_that_has_not_accepted_the_new_connection_yet() -> None:
    """A frozen iSCSI target, for example."""
    node = Node("disk", "iscsi", reconnect=1 << 30)
    old, new = replace(TCP, tcp_id=""), replace(FAR, tcp_id="", inode=8)
    servers = follow(sample(old, node=node), sample(new, node=node))
    assert servers.lasting == {90}
    assert early(servers) == risk(servers) == ""
    assert LOST in risk(servers, **ENDED)
    # The process that served the old connection certainly does not serve the new one.
    left = replace(old, peer=replace(PEER, leaves=True))
    assert LOST in risk(follow(sample(left, node=node), sample(new, node=node)), **ENDED)


def test_servers_that_are_replaced_again_and_again() -> None:
    """The node returns to a server that it had before, but has lost another one."""
    sockets = [replace(UNIX, inode=i, peer=replace(PEER, pid=90 + i % 3)) for i in range(7)]
    servers = follow(*map(sample, sockets))
    assert servers.left.keys() == {91, 92} and not servers.incomplete
    text = risk(servers, before=frozenset({91}))
    assert "process 91" in text and "process 90" not in text
    many = [replace(UNIX, inode=i, peer=replace(PEER, pid=90 + i)) for i in range(50)]
    servers = follow(*map(sample, many))
    assert len(servers.left) == MAX_LEFT and servers.incomplete
    assert not follow(*map(sample, many[: MAX_LEFT + 1])).incomplete
    assert risk(servers, before=servers.lasting).count("lost its server") == 1


@pytest.mark.parametrize(("protocol", "is_risk"), [("nbd", True), ("iscsi", True), ("rbd", False)])
def test_a_server_on_another_host_may_have_been_replaced(protocol: str, is_risk: bool) -> None:
    """A client of rbd closes idle connections."""
    node = Node("disk", protocol)
    far = replace(FAR, tcp_id="")
    servers = follow(sample(far, node=node), sample(replace(far, inode=8), node=node))
    assert ("lost its connection" in early(servers)) is is_risk
    assert ("lost its connection" in risk(servers)) is is_risk


def test_two_nodes_whose_connections_change_places() -> None:
    """Both lost their connections at once. Both servers still run, and serve the nodes."""
    old = (replace(UNIX, node="a"), replace(NEW, node="a"))
    new = tuple(replace(one, inode=one.inode + 10) for one in reversed(old))
    servers = follow(*(replace(SHOWN, nodes=(A, B), sockets=sockets) for sockets in (old, new)))
    assert {name: one.serving for name, one in servers.connected.items()} == {"a": {91}, "b": {90}}
    assert servers.left == {} and early(servers, ended=90) == ""


def test_a_worker_behind_the_server_was_replaced_but_still_runs() -> None:
    """A web server gives each connection to one of its workers."""

    def behind(pid: int) -> Sample:
        worker = replace(PEER, pid=pid, command="nginx", parent=70)
        return sample(replace(UNIX, peer=replace(PEER, behind=(worker,))))

    servers = follow(behind(71), behind(72))
    assert {70, 71} <= servers.lasting
    assert early(servers) == early(servers, 72) == risk(servers) == ""
    assert "lost nginx (process 71) behind its server" in early(servers, ended=71)
    assert "nginx (process 70) behind" in risk(servers, before=frozenset({70}))


def test_a_server_behind_the_server_was_replaced() -> None:
    def front(pid: int) -> Sample:
        behind = (replace(PEER, pid=pid, command="qemu-nbd"),)
        return sample(replace(UNIX, peer=replace(PEER, behind=behind)))

    text = "lost qemu-nbd (process 95) behind its server nbdkit (process 90) during the stop"
    assert text in early(follow(front(95), front(96)), ended=95)
    # When the guest exits, the front server may close its own connection first.
    closed = follow(front(95), sample(UNIX))
    assert early(closed) == risk(closed) == "" and 95 in closed.lasting
    # The server behind was connected only after the first sample.
    assert 96 in follow(sample(UNIX), front(96)).lasting


def test_the_text_names_the_server_that_ended() -> None:
    peer = replace(PEER, behind=(replace(PEER, pid=95, command="qemu-nbd"),))
    shown = sample(replace(UNIX, peer=peer))
    one = risk(shown, before=frozenset({95}))
    assert ": qemu-nbd (process 95) behind its server nbdkit (process 90) ended before" in one
    both = risk(shown, before=frozenset({90, 95}))
    assert ": its server nbdkit (process 90) and qemu-nbd (process 95) behind it ended" in both
    forked = sample(replace(UNIX, peer=replace(PEER, parent=80)))
    assert "nbdkit (process 80) ended" in risk(forked, before=frozenset({80}))


def test_a_server_that_started_after_the_job() -> None:
    servers = follow(sample(UNIX, node=KEPT))
    text = "nbdkit (process 90) started during the stop, so another ended"
    assert text in early(servers, 90) and text in risk(servers, young=frozenset({90}))
    assert early(servers, 91) == ""


IMAGE = ImagePlace(("disk",), "0:9")
MOUNT = Mount("fuse.sshfs", None, None, "0:9", servers=(PEER,), certain=True)
ON_FUSE = replace(SHOWN, nodes=(), sockets=(), mounts=(MOUNT,), images=(IMAGE,))


@pytest.mark.parametrize(
    ("shown", "ends", "text"),
    [
        (ON_FUSE, {}, ""),
        (ON_FUSE, ENDED, "fuse.sshfs file system 0:9: its server nbdkit (process 90) ended before"),
        (ON_FUSE, LATER, "ended at almost the same time"),
        (ON_FUSE, STOPPING, "was being stopped"),
        (ON_FUSE, {"young": frozenset({90})}, "started during the stop"),
        # Only writable images can lose data.
        (replace(ON_FUSE, images=()), ENDED, ""),
        (replace(ON_FUSE, images=(replace(IMAGE, mount="0:8"),)), ENDED, ""),
        (replace(ON_FUSE, images=None), ENDED, "ended before the guest"),
        (replace(ON_FUSE, mounts=(replace(MOUNT, servers=None),)), ENDED, ""),
    ],
)
def test_a_fuse_server(shown: Sample, ends: dict[str, Any], text: str) -> None:
    found = risk(follow(shown), **ends)
    assert (text in found) if text else (found == "")


def test_a_fuse_server_that_is_forked_is_watched_itself() -> None:
    forked = replace(MOUNT, servers=(replace(PEER, parent=80, leaves=None),))
    assert follow(replace(ON_FUSE, mounts=(forked,))).lasting == {90}


def test_a_server_behind_a_fuse_server_may_be_found_late() -> None:
    def shown(**fields: Any) -> Sample:
        return replace(ON_FUSE, mounts=(replace(MOUNT, servers=(replace(PEER, **fields),)),))

    behind = {"behind": (replace(PEER, pid=95, command="minio"),)}
    servers = follow(shown(behind_unknown=True), shown(**behind))
    assert servers.lasting == {90, 95}
    assert "minio (process 95) behind its server" in risk(servers, before=frozenset({95}))
    # Another sample may show less.
    assert follow(shown(**behind), shown(behind_unknown=True), ON_FUSE).lasting == {90, 95}
    replaced = follow(shown(**behind), shown(behind=(replace(PEER, pid=96),)))
    assert "lost minio (process 95) behind its server" in early(replaced, ended=95)


def test_what_may_be_a_fuse_server() -> None:
    both = (PEER, replace(PEER, pid=91))
    unsure = replace(ON_FUSE, mounts=(replace(MOUNT, servers=both, certain=False),))
    assert "what may be its server nbdkit (process 91) ended" in risk(
        follow(unsure), before=frozenset({91})
    )
    assert risk(follow(unsure), young=frozenset({91})) == ""
    servers = follow(unsure, ON_FUSE)
    assert servers.lasting == {90}
    # An exiting QEMU has closed the image.
    assert follow(unsure, ON_FUSE, replace(ON_FUSE, mounts=(), images=())) == servers
    assert needs_settling(servers, {})


@pytest.mark.parametrize(
    ("shown", "is_risk"),
    [
        (sample(UNIX), False),
        (sample(replace(TCP, peer=PEER)), False),
        (sample(replace(UNIX, peer=replace(PEER, behind=(replace(PEER, pid=95),)))), True),
        (sample(), False),
        (ON_FUSE, True),
    ],
)
def test_a_server_that_ended_while_qemu_used_it(shown: Sample, is_risk: bool) -> None:
    """If the server itself was connected, QEMU may have closed the connection after the sample."""
    servers = follow(sample(UNIX), shown)
    ended = frozenset({90})
    none = frozenset[int]()
    assert bool(risks_so_far(servers, none, ended, shown)) is is_risk
    assert risks_so_far(servers, none, ended, None)
    assert not risks_so_far(servers, none, frozenset({99}), None)


def test_the_number_of_mounts_that_are_followed_is_limited() -> None:
    mounts = [replace(MOUNT, number=f"0:{i}") for i in range(1000)]
    images = [ImagePlace((), mount.number) for mount in mounts]
    shown = [
        replace(ON_FUSE, mounts=(mount,), images=(image,))
        for mount, image in zip(mounts, images, strict=True)
    ]
    few = follow(*shown[:MAX_MOUNTS])
    many = follow(*shown)
    assert len(few.mounts) == len(many.mounts) == MAX_MOUNTS == 64
    assert many.incomplete and not few.incomplete
    assert follow(*shown, SHOWN).incomplete


def test_all_processes_that_may_be_a_fuse_server_are_remembered() -> None:
    def unsure(*pids: int) -> Sample:
        servers = tuple(replace(PEER, pid=pid) for pid in pids)
        return replace(ON_FUSE, mounts=(replace(MOUNT, servers=servers, certain=False),))

    servers = follow(unsure(61), unsure(61, 60), unsure(61))
    assert servers.lasting == {60, 61} and not servers.incomplete
    assert "process 60) ended" in risk(servers, before=frozenset({60}))
    many = follow(*(unsure(pid) for pid in range(60, 160)))
    assert many.lasting == set(range(60, 76)) and many.incomplete
    assert follow(unsure(61), ON_FUSE, unsure(62)).lasting == {90}
