"""Servers of network disks: SIGTERM waits until they are found, and the job does not end until it
is known whether they were stopped, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from errno import EMFILE
from signal import SIGKILL, SIGTERM

import pytest

from qkilld.decision.server_risks import SETTLE
from qkilld.decision.servers import MAX_LEFT
from qkilld.engine.job import Job
from qkilld.engine.ports import Process, ServerExits
from qkilld.engine.registry import Registry
from qkilld.engine.server_watch import MAX_SAMPLES, TIMEOUT
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag, GuestAsked, Phase, Result
from qkilld.model.event import MessageId
from qkilld.model.policy import Config
from qkilld.model.sample import Node, Peer, Sample, Socket
from tests.engine.conftest import IDLE, FakeProcess, S, World, make_guest

FORCE = Flag.FORCE
ROOT = Steerer(0, Rank.ROOT)
SERVER = 90
SOCKET = Socket(
    7, "unix", True, 0, 0, role="storage", node="d", peer=Peer(SERVER, "nbdkit", (), 0, None, ())
)
CONNECTED = replace(IDLE, nodes=(Node("d", "nbd"),), sockets=(SOCKET,))


@dataclass
class FakeExits:
    """Implements engine.ports.ServerExits."""

    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()
    first: bool | None = None
    watched: set[int] = field(default_factory=set)
    unwatched: frozenset[int] = frozenset()
    closed: int = 0
    starts: dict[int, int] = field(default_factory=dict)
    error: Exception | None = None
    """Raised by `add`."""
    on_question: Callable[[], None] = lambda: None
    """Called by `closed_first`."""

    def add(self, pid: int, seen_at: int) -> None:
        if self.error is not None:
            raise self.error
        self.watched.add(pid)

    def remove(self, pid: int) -> None:
        self.watched.discard(pid)

    def started(self, pid: int) -> int | None:
        return self.starts.get(pid, 0)

    def has_ended(self, pid: int) -> bool:
        return pid in self.before

    def ended(self) -> tuple[frozenset[int], frozenset[int]]:
        return self.before, self.after

    def closed_first(self, tcp_id: str) -> bool | None:
        self.on_question()
        return self.first

    def close(self) -> None:
        self.closed += 1


class ServedWorld(World):
    def __init__(self, shows: Callable[[int], Sample | None] = lambda now: CONNECTED) -> None:
        super().__init__()
        self.exits = FakeExits()
        self.error: Exception | None = None
        """Raised when the watch begins."""
        self.sampler.shows = shows
        self.registry = Registry(
            Config(),
            self.clock,
            self.journal,
            self.observer,
            self.sampler,
            self.monitors,
            server_exits=self._watch,
        )

    def _watch(self, process: Process) -> ServerExits:
        if self.error is not None:
            raise self.error
        return self.exits


def client() -> FakeProcess:
    guest = make_guest()
    return FakeProcess(replace(guest, label=replace(guest.label, remote=True)))


def end(world: ServedWorld, process: FakeProcess, job: Job) -> tuple[str, ...]:
    """End the process, and return the texts of the risks."""
    process.die()
    world.clock.advance(1)
    assert job.result is Result.EXITED
    assert world.exits.closed == 1
    return tuple(risk.text for risk in job.risks)


def sample_arrives(world: ServedWorld) -> None:
    (callback,) = world.sampler.late
    callback(replace(CONNECTED, at=world.clock.now()))
    world.clock.advance(0)


def test_sigterm_follows_the_first_sample() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.5)
    assert (job.phase, process.sent) == (Phase.QUIT, [])
    sample_arrives(world)
    assert (job.phase, process.sent) == (Phase.TERMINATE, [SIGTERM])
    assert world.exits.watched == {SERVER}
    assert end(world, process, job) == ()


def test_the_files_of_the_servers_are_closed_when_they_are_found() -> None:
    """The job's own samples keep the same files open, so they need not be open twice."""
    world, process = ServedWorld(), client()
    world.stop(process)
    assert world.sampler.closed == 1


def test_a_guest_without_network_storage_gets_sigterm_at_once() -> None:
    world, process = ServedWorld(), FakeProcess()
    job = world.stop(process, FORCE)
    assert (process.sent, world.sampler.looks) == ([SIGTERM], 0)
    process.die()
    assert (job.result, job.risks, world.exits.closed) == (Result.EXITED, (), 0)


@pytest.mark.parametrize("flags", [Flag.FIXED, Flag.NOWAIT, FORCE | Flag.NOWAIT])
def test_jobs_without_evidence_do_not_look(flags: Flag) -> None:
    world, process = ServedWorld(), client()
    world.stop(process, flags)
    assert process.sent == [SIGKILL if FORCE in flags else SIGTERM]
    assert world.sampler.looks == 0


def test_sigterm_does_not_wait_for_ever_and_unread_connections_are_a_risk() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.clock.advance(TIMEOUT / S - 0.01)
    assert process.sent == []
    world.clock.advance(0.02)
    assert process.sent == [SIGTERM]
    assert end(world, process, job) == (
        "its connections to the servers of its disks could not be read",
    )


def test_a_server_that_is_not_found_is_looked_for_again() -> None:
    unfound = replace(CONNECTED, sockets=(replace(SOCKET, peer=None),))
    world, process = ServedWorld(lambda now: unfound), client()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    assert process.sent == [SIGTERM]
    assert world.sampler.looks >= MAX_SAMPLES
    # A sample of the next phase may still find the server.
    world.sampler.shows = lambda now: CONNECTED
    world.clock.advance(1)
    assert world.exits.watched == {SERVER}
    assert end(world, process, job) == ()


def test_a_connection_that_the_first_sample_lacks_is_looked_for_again() -> None:
    world, process = ServedWorld(lambda now: replace(CONNECTED, sockets=())), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.05)
    assert process.sent == []
    world.sampler.shows = lambda now: CONNECTED
    world.clock.advance(0.1)
    assert process.sent == [SIGTERM] and world.exits.watched == {SERVER}
    assert end(world, process, job) == ()


@pytest.mark.parametrize(("protocol", "waits"), [("nbd", True), ("rbd", False)])
def test_a_node_that_has_no_connection_does_not_delay_sigterm_for_long(
    protocol: str, waits: bool
) -> None:
    """The command line need not name the servers of rbd."""
    nodes = (Node("d", protocol),)
    shown = replace(CONNECTED, nodes=nodes, sockets=())
    world, process = ServedWorld(lambda now: shown), client()
    world.stop(process, FORCE)
    world.clock.advance(0.05)
    assert process.sent == ([] if waits else [SIGTERM])
    world.clock.advance(0.1)
    assert process.sent == [SIGTERM]


def test_a_search_that_takes_two_seconds() -> None:
    unfound = replace(CONNECTED, sockets=(replace(SOCKET, peer=None),), searching=True)
    world, process = ServedWorld(lambda now: unfound), client()
    job = world.stop(process, FORCE)
    world.clock.advance(2)
    assert process.sent == []
    world.sampler.shows = lambda now: CONNECTED
    world.clock.advance(TIMEOUT / S - 2)
    assert process.sent == [SIGTERM]
    assert end(world, process, job) == ()


def test_a_late_sample_does_not_end_the_search() -> None:
    unfound = replace(CONNECTED, sockets=(replace(SOCKET, peer=None),), searching=True)
    world, process = ServedWorld(lambda now: unfound), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.5)
    world.sampler.shows = lambda now: None
    world.clock.advance(1.4)
    assert process.sent == []
    world.sampler.shows = lambda now: CONNECTED
    world.clock.advance(1)
    assert process.sent == [SIGTERM]
    assert end(world, process, job) == ()


def test_a_search_that_does_not_end() -> None:
    unfound = replace(CONNECTED, sockets=(replace(SOCKET, peer=None),), searching=True)
    world, process = ServedWorld(lambda now: unfound), client()
    world.stop(process, FORCE)
    world.clock.advance(TIMEOUT / S - 0.01)
    assert process.sent == []
    world.clock.advance(0.02)
    assert process.sent == [SIGTERM]


def test_a_search_that_does_not_end_takes_no_more_samples_after_sigterm() -> None:
    def samples(*, searching: bool) -> int:
        unfound = replace(CONNECTED, sockets=(replace(SOCKET, peer=None),), searching=searching)
        world = ServedWorld(lambda now: unfound)
        world.stop(client(), FORCE)
        world.clock.advance(TIMEOUT / S + 15)
        before = world.sampler.looks
        world.clock.advance(20)
        return world.sampler.looks - before

    assert samples(searching=True) == samples(searching=False)


def test_a_server_that_ended_before_the_guest() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    world.exits.before = frozenset({SERVER})
    (text,) = end(world, process, job)
    assert "nbd node d: its server nbdkit (process 90) ended before the guest" in text
    assert job.data_at_risk and job.risks[0].code == "unknown"


def test_the_job_ends_when_the_server_has_outlived_the_guest_for_a_while() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.01)
    gone = world.clock.now()
    process.die()
    world.clock.advance(SETTLE / S - 0.01)
    assert job.running
    world.exits.after = frozenset({SERVER})
    world.clock.advance(0.02)
    assert (job.result, job.ended) == (Result.EXITED, gone)
    assert "almost the same time" in job.risks[0].text


def test_a_proof_makes_the_wait_unnecessary() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    world.exits.before, world.exits.first = frozenset({SERVER}), True
    process.die()
    assert (job.result, job.risks) == (Result.EXITED, ())


def test_a_signal_that_ended_it_is_read_before_the_parent_reaps_it() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    process.die(SIGKILL)
    assert job.result is Result.EXITED
    assert "SIGKILL ended it" in job.risks[0].text


def test_cancel_while_the_servers_are_looked_for_sends_nothing() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    job.cancel()
    world.clock.advance(5)
    assert (job.result, process.sent, job.risks) == (Result.CANCELLED, [], ())


def test_a_held_job_sends_no_sigterm_when_the_servers_are_found() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    job.hold(ROOT)
    sample_arrives(world)
    world.clock.advance(5)
    assert process.sent == []
    job.release(ROOT)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]


def test_an_exit_while_they_are_looked_for() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    process.die()
    assert (job.result, process.sent) == (Result.EXITED, [])
    assert job.data_at_risk


def test_max_bounds_the_wait() -> None:
    world, process = ServedWorld(lambda now: None), client()
    world.stop(process, FORCE, spans={"max": S})
    world.clock.advance(0.6)
    assert process.sent == [SIGTERM]


def test_a_guest_that_is_asked_first() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, Flag.POWERDOWN)
    world.clock.advance(5)
    assert job.guest_asked is GuestAsked.UNREACHABLE
    assert process.sent == [SIGTERM]
    assert end(world, process, job) == ()


@pytest.mark.parametrize("flags", [FORCE, Flag.NOWAIT, Flag.POWERDOWN])
def test_a_server_that_another_job_stops(flags: Flag) -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.stop(FakeProcess(make_guest(pid=SERVER)), flags)
    world.clock.advance(0)
    (text,) = end(world, process, job)
    assert "was being stopped when the guest ended" in text


def test_a_server_whose_job_has_only_begun_still_serves() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    world.stop(FakeProcess(make_guest(pid=SERVER)), Flag.POWERDOWN)
    assert end(world, process, job) == ()


def test_a_server_whose_job_has_ended_with_it_is_no_longer_being_stopped() -> None:
    world, process = ServedWorld(), client()
    old = FakeProcess(make_guest(pid=SERVER), dies_of=(SIGTERM,))
    ended = world.stop(old, FORCE)
    old.wake()
    assert ended.result is Result.EXITED
    # The guest's process id has been reused.
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    assert end(world, process, job) == ()


UNREAD = "its connections to the servers of its disks could not be read"
NO_DESCRIPTOR = OSError(EMFILE, "Too many open files")


@pytest.mark.parametrize("error", [NO_DESCRIPTOR, RuntimeError("a bug")])
def test_sigterm_is_sent_if_servers_cannot_be_watched(error: Exception) -> None:
    world, process = ServedWorld(), client()
    world.error = error
    job = world.stop(process, FORCE)
    assert process.sent == [SIGTERM]
    assert (MessageId.INTERNAL_ERROR in world.journal.ids) == isinstance(error, RuntimeError)
    process.die()
    assert (job.result, [risk.text for risk in job.risks]) == (Result.EXITED, [UNREAD])


@pytest.mark.parametrize("error", [NO_DESCRIPTOR, RuntimeError("a bug")])
@pytest.mark.parametrize("late", [False, True])
def test_sigterm_is_sent_if_a_server_cannot_be_watched(error: Exception, late: bool) -> None:
    world, process = ServedWorld(lambda now: None if late else CONNECTED), client()
    world.exits.error = error
    job = world.stop(process, FORCE)
    if late:
        sample_arrives(world)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]
    assert end(world, process, job) == (UNREAD,)


def test_a_sample_after_sigterm_whose_server_cannot_be_watched() -> None:
    world, process = ServedWorld(), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    world.exits.error = RuntimeError("a bug")
    other = replace(SOCKET, inode=8, peer=Peer(SERVER + 1, "nbdkit", (), 0, None, ()))
    world.sampler.shows = lambda now: replace(CONNECTED, sockets=(other,))
    world.clock.advance(600)
    assert process.sent == [SIGTERM, SIGKILL]


def test_a_server_whose_end_would_not_be_noticed_is_a_risk() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    world.exits.unwatched = frozenset({SERVER})
    (text,) = end(world, process, job)
    assert "could not watch" in text


def test_a_proof_makes_the_watch_unnecessary() -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    world.exits.unwatched, world.exits.first = frozenset({SERVER}), True
    process.die()
    assert (job.result, job.risks) == (Result.EXITED, ())


def test_an_exit_before_the_watch_began_is_a_risk() -> None:
    """A resumed job waits for its turn before its first sample. Here the guest exits before
    that."""
    world, process = ServedWorld(), client()
    past = world.stop(process, FORCE).snapshot()
    after = ServedWorld()
    job = after.registry.resume(process, past, among_many=True)
    process.die()
    assert (job.result, [risk.text for risk in job.risks]) == (Result.EXITED, [UNREAD])


def test_only_the_present_server_and_the_first_ones_are_watched() -> None:
    world, process = ServedWorld(), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    last = 100 + MAX_LEFT - 1
    for pid in range(100, last + 4):
        other = replace(SOCKET, inode=pid, peer=Peer(pid, "nbdkit", (), 0, None, ()))
        world.sampler.shows = lambda now, other=other: replace(  # type: ignore[misc]
            CONNECTED, sockets=(other,)
        )
        world.clock.advance(1)
        assert world.exits.watched == {SERVER, *range(100, min(pid + 1, last)), pid}


def test_the_loop_does_not_ask_for_long_which_end_closed_the_connections() -> None:
    names = [f"d{number}" for number in range(256)]
    many = replace(
        CONNECTED,
        nodes=tuple(Node(name, "nbd") for name in names),
        sockets=tuple(
            replace(SOCKET, inode=at, node=name, tcp_id=name) for at, name in enumerate(names)
        ),
    )
    world, process = ServedWorld(lambda now: many), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.01)
    gone = world.clock.now()
    world.exits.on_question = lambda: world.clock.advance(0.02)
    process.die()
    assert job.running
    assert world.clock.now() - gone <= 0.04 * S
    world.exits.before = frozenset({SERVER})
    world.clock.advance(SETTLE / S)
    assert len(job.risks) == len(names)


def resumed(world: ServedWorld, process: FakeProcess) -> tuple[ServedWorld, FakeProcess, Job]:
    """Continue a job in another daemon, whose sampler returns the same samples."""
    (past,) = (job.snapshot() for job in world.registry)
    after = ServedWorld(world.sampler.shows)
    after.clock.advance((world.clock.now() - after.clock.now()) / S)
    job = after.registry.resume(process, past)
    after.clock.advance(0)
    return after, process, job


@pytest.mark.parametrize("pluggable", [False, True])
def test_a_job_of_an_earlier_daemon_whose_node_is_not_connected(pluggable: bool) -> None:
    """Before SIGTERM, QEMU may have closed the node, or the node may have lost its server."""
    world, process = ServedWorld(), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    closed = replace(CONNECTED, sockets=(), pluggable=pluggable)
    world.sampler.shows = lambda now: closed
    assert end(*resumed(world, process)) == (
        "it is not known whether nbd node d had its server until QEMU closed it",
    )


@pytest.mark.parametrize(
    "node",
    [
        Node("d", "nbd", read_only=True),
        Node("d", "vhost-user"),
        Node("d", "iscsi", reconnect=1 << 30),
    ],
)
def test_a_job_of_an_earlier_daemon_whose_node_loses_nothing(node: Node) -> None:
    world, process = ServedWorld(), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    world.sampler.shows = lambda now: replace(CONNECTED, nodes=(node,), sockets=())
    assert end(*resumed(world, process)) == ()


def test_a_job_of_an_earlier_daemon_whose_node_is_connected() -> None:
    world, process = ServedWorld(), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    assert end(*resumed(world, process)) == ()


def test_a_job_of_an_earlier_daemon_that_has_sent_no_sigterm() -> None:
    world, process = ServedWorld(lambda now: None), client()
    world.stop(process, FORCE)
    world.sampler.shows = lambda now: replace(CONNECTED, sockets=())
    after, process, job = resumed(world, process)
    assert "had no connection to its server" in end(after, process, job)[0]


@pytest.mark.parametrize("pluggable", [False, True])
def test_the_first_sample_comes_after_sigterm(pluggable: bool) -> None:
    """This happens on a busy host. QEMU may have closed the node, or the node may have lost its
    server earlier."""
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.clock.advance(TIMEOUT / S)
    assert process.sent == [SIGTERM]
    both = replace(CONNECTED, nodes=(Node("c", "nbd"), Node("d", "nbd")), pluggable=pluggable)
    world.sampler.shows = lambda now: both
    world.clock.advance(1)
    assert end(world, process, job) == (
        "it is not known whether nbd node c had its server until QEMU closed it",
    )


@pytest.mark.parametrize("stopping", [False, True])
def test_cancel_while_the_job_waits_for_the_servers(stopping: bool) -> None:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.01)
    gone = world.clock.now()
    process.die()
    world.clock.advance(SETTLE / S / 2)
    if stopping:
        world.exits.before = frozenset({SERVER})
    world.registry.cancel_all("qkilld was stopped")
    assert (job.result, job.ended, job.error) == (Result.EXITED, gone, "")
    *others, last = (risk.text for risk in job.risks)
    assert "cancelled before it was known" in last
    assert len(others) == stopping
    world.clock.advance(5)
    assert world.exits.closed == 1


def test_cancel_after_an_exit_without_a_signal_keeps_the_risks() -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.sampler.late[0](replace(CONNECTED, at=world.clock.now()))
    process.die()
    assert job.running
    job.cancel()
    assert (job.result, process.sent) == (Result.EXITED, [])
    assert job.data_at_risk


@pytest.mark.parametrize("sent", [False, True])
def test_cancel_before_the_exit_is_noticed(sent: bool) -> None:
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.sampler.late[0](replace(CONNECTED, at=world.clock.now()))
    if sent:
        world.clock.advance(0)
        assert process.sent == [SIGTERM]
    process.dead = True
    world.exits.before = frozenset({SERVER})
    job.cancel()
    assert job.result is Result.EXITED
    assert "d" in "".join(risk.text for risk in job.risks)
    assert job.data_at_risk
