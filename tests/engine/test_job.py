"""Jobs under a fake clock: the exact sequence of phases and signals."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from signal import SIGKILL, SIGTERM

import pytest

from qkilld.engine import events
from qkilld.model.constants import INFINITY, Flag, Result, Verdict
from qkilld.model.errors import Failed, NoSuchProcess
from qkilld.model.event import MessageId, Priority
from qkilld.model.policy import Config, Policy

from .conftest import FakeProcess, S, World, make_guest

FORCE, NOWAIT, FIXED = Flag.FORCE, Flag.NOWAIT, Flag.FIXED


def test_a_guest_that_exits_on_sigterm(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE | FIXED)
    assert process.sent == [SIGTERM]
    assert job.deadline == job.started + 10 * S
    world.clock.advance(0.004)
    process.die()
    assert (job.result, job.verdict, job.elapsed) == (Result.EXITED, Verdict.GONE, 4_000)
    assert world.observer.seen == ["terminate", "done", "exited"]
    assert process.sent == [SIGTERM]
    assert process.closed
    assert job.deadline == INFINITY


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_force_kills_at_ten_seconds(world: World, flags: Flag) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    world.clock.advance(9.999999)
    assert process.sent == [SIGTERM]
    world.clock.advance(0.000001)
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert job.result is Result.KILLED
    assert job.elapsed == 10 * S
    assert world.observer.seen == ["terminate", "kill", "reap", "done", "killed"]


def test_force_gives_up_five_seconds_after_sigkill(world: World) -> None:
    process = FakeProcess(dies_of=())
    job = world.stop(process, FORCE)
    world.clock.advance(14.999999)
    assert job.running
    assert job.deadline == job.started + 15 * S
    world.clock.advance(0.000001)
    assert job.result is Result.SURVIVED
    assert process.sent == [SIGTERM, SIGKILL]
    assert world.observer.seen == ["terminate", "kill", "reap", "done", "survived"]


@pytest.mark.parametrize("flags", [Flag(0), FIXED])
def test_without_force_never_a_sigkill(world: World, flags: Flag) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    world.clock.advance(14.999999)
    assert job.running
    world.clock.advance(0.000001)
    assert job.result is Result.SURVIVED
    world.clock.advance(3600)
    assert process.sent == [SIGTERM]
    assert world.observer.seen == ["terminate", "done", "survived"]


def test_a_survivor_stays_watched_and_its_end_is_logged(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process)
    world.clock.advance(20)
    assert not process.closed
    process.die()
    assert process.closed
    assert job.result is Result.SURVIVED
    event = world.journal.events[-1]
    assert event.id is MessageId.SURVIVOR_GONE
    assert event.fields["QKILLD_ELAPSED_USEC"] == str(20 * S)


def test_nowait_is_one_sigterm(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, NOWAIT)
    assert process.sent == [SIGTERM]
    assert job.result is Result.SIGNALLED
    assert process.closed
    assert world.observer.seen == ["terminate", "done", "signalled"]


def test_nowait_with_force_is_one_sigkill_even_if_that_ends_it_at_once(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, NOWAIT | FORCE)
    assert process.sent == [SIGKILL]
    assert job.result is Result.SIGNALLED
    assert world.observer.seen == ["kill", "done", "signalled"]


def test_no_sigkill_for_a_process_that_exited_with_the_deadline(world: World) -> None:
    """The loop runs the timer first, but the pidfd already shows the exit."""
    process = FakeProcess()
    job = world.stop(process, FORCE)
    process.dead = True
    world.clock.advance(10)
    assert process.sent == [SIGTERM]
    assert job.result is Result.EXITED


def test_a_zombie_has_exited(world: World) -> None:
    process = FakeProcess(zombie=True)
    job = world.stop(process, FORCE)
    process.die()
    assert (job.result, job.verdict) == (Result.EXITED, Verdict.ZOMBIE)


def test_refused_first_signal_is_an_error_and_no_job(world: World) -> None:
    process = FakeProcess(refuses=(SIGTERM,))
    with pytest.raises(Failed, match="4711"):
        world.stop(process)
    assert process.closed
    assert list(world.registry) == []
    assert world.journal.ids == [MessageId.SIGNAL_REFUSED]
    assert world.observer.seen == []


def test_gone_before_the_first_signal_is_an_error_and_no_job(world: World) -> None:
    process = FakeProcess(dead=True)
    with pytest.raises(NoSuchProcess, match="4711"):
        world.stop(process)
    assert process.closed
    assert list(world.registry) == []


def test_refused_sigkill_fails_the_job(world: World) -> None:
    process = FakeProcess(refuses=(SIGKILL,))
    job = world.stop(process, FORCE)
    world.clock.advance(10)
    assert job.result is Result.FAILED
    assert "SIGKILL" in job.error
    assert process.closed
    assert MessageId.SIGNAL_REFUSED in world.journal.ids


def test_cancel(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(3)
    job.cancel()
    world.clock.advance(60)
    assert job.result is Result.CANCELLED
    assert job.elapsed == 3 * S
    assert process.sent == [SIGTERM]
    assert process.closed
    job.cancel()
    assert job.result is Result.CANCELLED


def test_grace_option(world: World) -> None:
    process = FakeProcess()
    world.stop(process, FORCE | FIXED, spans={"grace": 2 * S})
    world.clock.advance(1.999999)
    assert process.sent == [SIGTERM]
    world.clock.advance(0.000001)
    assert process.sent == [SIGTERM, SIGKILL]


def test_waiting_callers_get_the_result_before_the_journal(world: World) -> None:
    order: list[str] = []
    process = FakeProcess()
    job = world.stop(process)
    job.when_ended(lambda: order.append(f"answer after {len(world.journal.events)} events"))
    before = len(world.journal.events)
    process.die()
    assert order == [f"answer after {before} events"]
    assert len(world.journal.events) == before + 1


def test_the_story_in_the_journal(world: World) -> None:
    process = FakeProcess()
    world.stop(process, FORCE, reason="host upgrade", uid=1000)
    world.clock.advance(10)
    process.wake()
    assert [(e.id, e.priority) for e in world.journal.events] == [
        (MessageId.JOB_STARTED, Priority.INFO),
        (MessageId.SIGNAL_SENT, Priority.INFO),
        (MessageId.VERDICT_TURNED, Priority.INFO),
        (MessageId.SIGNAL_SENT, Priority.NOTICE),
        (MessageId.JOB_ENDED, Priority.NOTICE),  # nothing was outstanding
    ]
    started, term, verdict, kill, receipt = world.journal.events
    assert verdict.fields["QKILLD_VERDICT"] == "idle"
    assert verdict.fields["QKILLD_REASONS"] == "nothing moves and nothing is outstanding"
    assert started.fields["QKILLD_REASON"] == "host upgrade"
    assert started.fields["QKILLD_REQUESTED_BY"] == "1000"
    assert (term.fields["QKILLD_SIGNAL"], term.fields["QKILLD_PHASE"]) == ("SIGTERM", "terminate")
    assert (kill.fields["QKILLD_SIGNAL"], kill.fields["QKILLD_PHASE"]) == ("SIGKILL", "kill")
    assert receipt.fields["QKILLD_RESULT"] == "killed"
    assert receipt.fields["QKILLD_ELAPSED_USEC"] == str(10 * S)
    for event in world.journal.events:
        assert event.guest is not None
        assert event.fields["QKILLD_JOB"] == "1"
        assert event.fields["QKILLD_GUEST"] == "web"
        assert event.fields["QKILLD_VERDICT"]
        assert "\n" not in event.message


@pytest.mark.parametrize(("name", "killed_after"), [("", 10), ("web", 10), ("db", 50), (None, 50)])
def test_a_name_that_is_not_known_gets_the_longest_times(
    name: str | None, killed_after: int
) -> None:
    world = World(Config(guests={"db": Policy(grace=50 * S), "fast": Policy(grace=2 * S)}))
    guest = make_guest()
    process = FakeProcess(replace(guest, label=replace(guest.label, name=name)))
    world.stop(process, FORCE)
    world.clock.advance(killed_after - 0.1)
    assert SIGKILL not in process.sent
    world.clock.advance(0.2)
    assert SIGKILL in process.sent
    assert (events.NAME_UNKNOWN in world.journal.events[0].message) is (name is None)


def test_only_the_requester_is_missed(world: World) -> None:
    job = world.stop(FakeProcess(), uid=1000)
    waits = [lambda: None, lambda: None, lambda: None]
    for wait, uid in zip(waits, (1000, 1000, 1001), strict=True):
        job.when_ended(wait, uid)
    job.forget_waiter(waits[0], disconnected=True)
    assert MessageId.WAITER_GONE not in world.journal.ids
    job.forget_waiter(waits[1], disconnected=True)
    # The requester no longer waits. It makes no difference that another user still waits.
    assert world.journal.ids.count(MessageId.WAITER_GONE) == 1
    job.forget_waiter(waits[2], disconnected=True)
    job.forget_waiter(waits[1], disconnected=True)
    assert world.journal.ids.count(MessageId.WAITER_GONE) == 1


def test_many_waiters_leave_in_no_time(world: World) -> None:
    """A client that disconnects removes all its waits. When waits were kept in a list, removing
    30,000 took 12 s."""
    job = world.stop(FakeProcess())
    waits = [functools.partial(print) for _ in range(100_000)]
    began = time.process_time()
    for wait in waits:
        job.when_ended(wait)
    for wait in reversed(waits):
        job.forget_waiter(wait, disconnected=True)
    assert time.process_time() - began < 5
