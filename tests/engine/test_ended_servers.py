"""Servers that end while a job runs, and may lose data that they have acknowledged."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGTERM

import pytest

from qkilld.decision.servers import MAX_MOUNTS
from qkilld.engine.job import Job
from qkilld.engine.server_watch import MAX_RISKS
from qkilld.model.constants import Result
from qkilld.model.job import FlushReport
from qkilld.model.sample import ImagePlace, Mount, Peer, Sample
from tests.engine.conftest import IDLE, FakeProcess, S
from tests.engine.test_server_watch import (
    CONNECTED,
    FORCE,
    NO_DESCRIPTOR,
    SERVER,
    SOCKET,
    ServedWorld,
    client,
    end,
    resumed,
    sample_arrives,
)

NEW = Peer(SERVER + 1, "nbdkit", (), 0, None, ())
OTHER = replace(SOCKET, inode=8, peer=NEW)
REPLACED = replace(CONNECTED, sockets=(OTHER,))
BEHIND = Peer(95, "qemu-nbd", (), 0, None, ())
LOST = "nbd node d lost its server nbdkit (process 90) during the stop"


def begun() -> tuple[ServedWorld, FakeProcess, Job]:
    world, process = ServedWorld(), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]
    return world, process, job


def test_a_server_that_was_replaced_is_a_risk_at_once() -> None:
    world, process, job = begun()
    world.sampler.shows = lambda now: REPLACED
    world.exits.before = frozenset({SERVER})
    world.clock.advance(1)
    assert job.running and LOST in job.risks[0].text
    (text,) = end(world, process, job)
    assert LOST in text


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_replaced_server_that_still_runs_is_watched(is_watched: bool) -> None:
    world, process, job = begun()
    world.sampler.shows = lambda now: REPLACED
    world.clock.advance(1)
    assert world.exits.watched == {SERVER, SERVER + 1}
    assert job.running and job.risks == ()
    world.exits.unwatched = frozenset() if is_watched else frozenset({SERVER})
    texts = end(world, process, job)
    assert len(texts) == (not is_watched) and all("could not watch" in text for text in texts)


def test_a_replaced_server_is_remembered_across_a_restart_of_the_daemon() -> None:
    world, process, _ = begun()
    world.sampler.shows = lambda now: REPLACED
    world.exits.before = frozenset({SERVER})
    world.clock.advance(1)
    (text,) = end(*resumed(world, process))
    assert LOST in text


@pytest.mark.parametrize("is_other", [True, False])
@pytest.mark.parametrize("has_ended", [True, False])
def test_the_next_daemon_watches_the_same_servers(is_other: bool, has_ended: bool) -> None:
    """A server that ended meanwhile, whether QEMU had left it before, or only lost it then."""
    world, process, job = begun()
    if is_other:
        world.sampler.shows = lambda now: REPLACED
        world.clock.advance(1)
        assert job.risks == ()
    (past,) = (job.snapshot() for job in world.registry)
    assert SERVER in {one.pid for one in past.servers}
    after = ServedWorld(lambda now: REPLACED)
    after.exits.before = frozenset({SERVER} if has_ended else ())
    after.clock.advance((world.clock.now() - after.clock.now()) / S + 5)
    resumed_job = after.registry.resume(process, past)
    after.clock.advance(0)
    assert after.exits.watched == {SERVER, SERVER + 1}
    assert len(resumed_job.risks) == has_ended
    texts = end(after, process, resumed_job)
    assert len(texts) == has_ended and all(LOST in text for text in texts)


def test_the_next_daemon_judges_a_server_that_it_finds_by_its_connection() -> None:
    """The kernel proves that the guest closed the connection first."""
    over_tcp = replace(CONNECTED, sockets=(replace(SOCKET, family="tcp", tcp_id="02"),))
    world, process = ServedWorld(lambda now: over_tcp), client()
    world.stop(process, FORCE)
    world.clock.advance(0)
    after, process, job = resumed(world, process)
    after.exits.first, after.exits.after = True, frozenset({SERVER})
    assert end(after, process, job) == ()


def test_a_daemon_that_saw_no_servers_keeps_what_was_saved() -> None:
    world, process, _ = begun()
    world.sampler.shows = lambda now: None
    again, process, job = resumed(world, process)
    assert {one.pid for one in job.snapshot().servers} == {SERVER}
    again.sampler.shows = lambda now: CONNECTED
    _, process, job = resumed(again, process)
    assert {one.pid for one in job.snapshot().servers} == {SERVER}


def test_a_server_that_was_replaced_while_no_daemon_ran() -> None:
    """The new server is younger than the job, which shows that another one ended."""
    world, process, job = begun()
    past = replace(job.snapshot(), servers=())
    after = ServedWorld(lambda now: REPLACED)
    after.exits.starts = {SERVER + 1: past.started + S}
    after.clock.advance((world.clock.now() - after.clock.now()) / S + 5)
    job = after.registry.resume(process, past)
    after.clock.advance(0)
    (text,) = end(after, process, job)
    assert "nbdkit (process 91) started during the stop, so another ended" in text


@pytest.mark.parametrize(("after", "is_risk"), [(-S, False), (0, True), (2 * S, False)])
def test_a_server_that_was_replaced_before_it_was_found(after: int, is_risk: bool) -> None:
    """If the process is younger than the sample that shows it, its id has been reused."""
    world, process = ServedWorld(lambda now: None), client()
    job = world.stop(process, FORCE)
    world.clock.advance(0.5)
    world.exits.starts = {SERVER: job.started + after}
    sample_arrives(world)
    assert bool(end(world, process, job)) is is_risk


def test_a_server_behind_that_ends_while_qemu_runs_is_a_risk_at_once() -> None:
    world, process = ServedWorld(), client()
    front = Peer(SERVER, "nbdkit", (), 0, None, (), behind=(BEHIND,))
    world.sampler.shows = lambda now: replace(CONNECTED, sockets=(replace(SOCKET, peer=front),))
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    assert not job.data_at_risk
    world.exits.before = frozenset({95})
    world.clock.advance(1)
    assert "qemu-nbd (process 95) behind its server nbdkit (process 90)" in job.risks[0].text
    assert len(end(world, process, job)) == 1


@pytest.mark.parametrize("is_before", [True, False])
def test_only_a_server_that_ended_before_the_flush_is_a_risk(is_before: bool) -> None:
    world, process, job = begun()
    if is_before:
        world.exits.before = frozenset({SERVER})
    job.flush = FlushReport("complete", "", proven=True)
    job._servers.note_flush()
    world.clock.advance(1)
    world.exits.before = frozenset({SERVER})
    world.sampler.shows = lambda now: REPLACED
    world.clock.advance(1)
    process.die()
    assert job.result is Result.EXITED
    assert bool(job.risks) is is_before


@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_daemon_that_was_restarted_knows_the_flush(is_flushed: bool) -> None:
    world, process, job = begun()
    if is_flushed:
        job.flush = FlushReport("complete", "", proven=True)
        job._servers.note_flush()
    past = replace(job.snapshot(), servers=())
    after = ServedWorld()
    after.exits.starts = {SERVER: past.started + S}
    after.clock.advance((world.clock.now() - after.clock.now()) / S + 5)
    job = after.registry.resume(process, past)
    after.clock.advance(0)
    assert bool(end(after, process, job)) is not is_flushed


FAR = replace(SOCKET, family="tcp", tcp_id="02", peer=None)


@pytest.mark.parametrize("is_before", [True, False])
def test_a_server_on_another_host_that_was_replaced_before_the_flush(is_before: bool) -> None:
    """No process can be watched, so a sample right after the flush shows it."""
    world, process = ServedWorld(lambda now: replace(CONNECTED, sockets=(FAR,))), client()
    world.exits.first = True
    job = world.stop(process, FORCE)
    world.clock.advance(0)
    other = replace(CONNECTED, sockets=(replace(FAR, inode=8),))
    if is_before:
        world.sampler.shows = lambda now: other
    job.flush = FlushReport("complete", "", proven=True)
    job._servers.note_flush()
    world.sampler.shows = lambda now: other
    assert len(job.risks) == is_before
    world.clock.advance(1)
    process.die()
    assert job.result is Result.EXITED
    assert ["lost its connection" in one.text for one in job.risks] == [True] * is_before


MOUNT = Mount("fuse.sshfs", None, None, "0:9", servers=(Peer(SERVER, "sshfs", (), 0, None, ()),))
ON_FUSE = replace(IDLE, mounts=(replace(MOUNT, certain=True),), images=(ImagePlace((), "0:9"),))
FUSE_ENDED = "fuse.sshfs file system 0:9: its server sshfs (process 90) ended before the guest"


@pytest.mark.parametrize("is_seen", [False, True])
def test_a_fuse_server_that_ended_before_the_guest(is_seen: bool) -> None:
    """The guest needs no server on a network, so its servers are not searched for before
    SIGTERM."""
    world, process = ServedWorld(lambda now: ON_FUSE), FakeProcess()
    job = world.stop(process, FORCE)
    assert process.sent == [SIGTERM]
    world.clock.advance(1)
    assert world.exits.watched == {SERVER}
    world.exits.before = frozenset({SERVER})
    world.clock.advance(1 if is_seen else 0)
    assert len(job.risks) == is_seen
    (text,) = end(world, process, job)
    assert FUSE_ENDED in text


def test_a_process_that_may_have_been_the_fuse_server_ended() -> None:
    """The sample that shows its end no longer shows it as a possible server."""
    other = Peer(SERVER + 1, "gvfsd-fuse", (), 0, None, ())
    both = replace(MOUNT, servers=((MOUNT.servers or ())[0], other))
    world, process = ServedWorld(lambda now: replace(ON_FUSE, mounts=(both,))), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    world.exits.before = frozenset({SERVER})
    only = replace(MOUNT, servers=(other,), certain=True)
    world.sampler.shows = lambda now: replace(ON_FUSE, mounts=(only,))
    world.clock.advance(1)
    assert "what may be its server sshfs (process 90) ended" in job.risks[0].text


def test_a_fuse_server_that_outlives_the_guest_is_no_risk() -> None:
    world, process = ServedWorld(lambda now: ON_FUSE), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    assert end(world, process, job) == ()


def test_a_fuse_server_that_cannot_be_watched_is_a_risk() -> None:
    world, process = ServedWorld(lambda now: ON_FUSE), FakeProcess()
    world.error = NO_DESCRIPTOR
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    process.die()
    assert "could not watch" in job.risks[0].text


def test_an_ended_fuse_server_is_remembered_across_a_restart_of_the_daemon() -> None:
    world, process = ServedWorld(lambda now: ON_FUSE), FakeProcess()
    world.stop(process, FORCE)
    world.clock.advance(1)
    world.exits.before = frozenset({SERVER})
    world.clock.advance(1)
    world.sampler.shows = lambda now: IDLE
    _, process, job = resumed(world, process)
    process.die()
    assert FUSE_ENDED in job.risks[0].text


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_server_that_is_replaced_every_second_is_not_reported_every_time(is_behind: bool) -> None:
    world, _, job = begun()

    def shows(now: int) -> Sample:
        pid = SERVER + now // S
        world.exits.starts[pid] = now
        world.exits.before |= {pid - 1}
        peer = replace(NEW, pid=pid)
        if is_behind:
            socket = replace(SOCKET, peer=Peer(SERVER, "nbdkit", (), 0, None, (), behind=(peer,)))
        else:
            socket = replace(SOCKET, inode=pid, peer=peer)
        return replace(CONNECTED, at=now, sockets=(socket,))

    world.sampler.shows = shows
    for _ in range(25):
        world.clock.advance(1)
    assert job.running and 0 < len(job.risks) <= (MAX_RISKS if is_behind else 4)


def test_at_most_64_fuse_file_systems_are_followed() -> None:
    numbers = [f"0:{i}" for i in range(MAX_MOUNTS + 1)]
    many = replace(
        ON_FUSE,
        mounts=tuple(replace(MOUNT, number=number, certain=True) for number in numbers),
        images=tuple(ImagePlace((), number) for number in numbers),
    )
    world, process = ServedWorld(lambda now: many), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    assert job.running and "could not watch" in job.risks[0].text
    assert len(end(world, process, job)) == 1
