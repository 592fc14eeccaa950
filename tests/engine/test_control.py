"""Jobs that are held, extended and forced, with a fake clock."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGTERM, Signals

import pytest

from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import INFINITY, Flag, Result
from qkilld.model.errors import Failed
from qkilld.model.event import MessageId
from qkilld.model.policy import Config, Policy
from qkilld.model.sample import Io, Sample

from .conftest import IDLE, ON_PIPE, FakeProcess, S, World

FORCE, FIXED = Flag.FORCE, Flag.FIXED
ADMIN = Steerer(1001, Rank.AUTHORIZED)


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_a_held_job_sends_nothing_until_it_is_released(world: World, flags: Flag) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    world.clock.advance(9)
    job.hold(ADMIN)
    job.hold(ADMIN)
    assert job.deadline == INFINITY
    world.clock.advance(3600)
    assert process.sent == [SIGTERM]
    assert job.running
    job.release(ADMIN)
    # SIGKILL is due at once: the grace has passed, and samples were taken during the hold.
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert job.result is Result.KILLED
    assert world.journal.ids.count(MessageId.JOB_HELD) == 1


def test_released_in_time_it_goes_on_as_before(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    job.hold(ADMIN)
    world.clock.advance(5)
    job.release(ADMIN)
    job.release(ADMIN)
    assert job.deadline == job.started + 10 * S
    assert world.journal.ids.count(MessageId.JOB_RELEASED) == 1


def test_progress_during_a_hold_counts(world: World) -> None:
    process = FakeProcess()
    world.sampler.shows = lambda now: replace(IDLE, io=Io(0, 0, 0, 0, 0, now, 0))
    job = world.stop(process, FORCE)
    job.hold(ADMIN)
    looks = world.sampler.looks
    world.clock.advance(100)
    assert world.sampler.looks > looks + 50
    job.release(ADMIN)
    assert process.sent == [SIGTERM]
    assert job.deadline > world.clock.now()


@pytest.mark.parametrize("flags", [Flag(0), FIXED])
def test_a_held_job_does_not_give_up(world: World, flags: Flag) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    job.hold(ADMIN)
    world.clock.advance(3600)
    assert job.running
    job.release(ADMIN)
    assert job.result is Result.SURVIVED
    assert process.sent == [SIGTERM]


def test_a_held_job_ends_when_its_guest_does(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    job.hold(ADMIN)
    process.die()
    assert job.result is Result.EXITED


def test_a_stopped_guest_is_not_continued_while_held(world: World) -> None:
    process = FakeProcess()
    world.sampler.shows = lambda now: Sample(now, "T", tracer=0)
    job = world.stop(process, FORCE)
    job.hold(ADMIN)
    world.clock.advance(5)
    assert process.sent == [SIGTERM]
    job.release(ADMIN)
    assert process.sent == [SIGTERM, SIGCONT]


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_an_extended_job_sends_no_sigkill_before(world: World, flags: Flag) -> None:
    """An extension beyond MaxSec= overrides MaxSec=."""
    world = World(Config(Policy(max=12 * S)))
    process = FakeProcess()
    job = world.stop(process, flags)
    world.clock.advance(8)
    job.extend(20 * S, ADMIN)
    assert job.deadline == job.started + 28 * S
    job.extend(3 * S, ADMIN)  # Less than before.
    world.clock.advance(19.999999)
    assert process.sent == [SIGTERM]
    world.clock.advance(0.000001)
    assert process.sent == [SIGTERM, SIGKILL]
    assert world.journal.ids.count(MessageId.JOB_EXTENDED) == 1


def test_less_than_there_is_changes_nothing(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    job.extend(1 * S, ADMIN)
    assert job.deadline == job.started + 10 * S


def test_without_force_an_extended_job_gives_up_later(world: World) -> None:
    job = world.stop(FakeProcess(), Flag(0))
    job.extend(30 * S, ADMIN)
    assert job.deadline == job.started + 35 * S


def test_for_ever(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    job.extend(INFINITY, ADMIN)
    world.clock.advance(100_000)
    assert process.sent == [SIGTERM]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("flags", [Flag(0), FORCE, FIXED])
def test_force_kills_now(world: World, flags: Flag, held: bool) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    if held:
        job.hold(ADMIN)
        job.extend(3600 * S, ADMIN)
    world.clock.advance(1)
    job.force(ADMIN)
    assert process.sent == [SIGTERM, SIGKILL]
    assert FORCE in job.flags
    process.wake()
    assert job.result is Result.KILLED
    assert world.journal.ids[1:] == [
        MessageId.SIGNAL_SENT,
        *([MessageId.JOB_HELD, MessageId.JOB_EXTENDED] if held else []),
        *([MessageId.VERDICT_TURNED] if FIXED not in flags else []),
        MessageId.JOB_FORCED,
        MessageId.SIGNAL_SENT,
        MessageId.JOB_ENDED,
    ]


def test_force_of_a_guest_that_has_just_gone(world: World) -> None:
    """The pidfd shows the exit before the loop has noticed it."""
    process = FakeProcess(dead=False)
    job = world.stop(process, Flag(0))
    process.dead = True
    job.force(ADMIN)
    assert job.flags == Flag(0)
    process.wake()
    assert job.result is Result.EXITED


@pytest.mark.parametrize("dies_of", [(SIGKILL,), ()])
def test_after_the_end_there_is_nothing_to_do(world: World, dies_of: tuple[Signals, ...]) -> None:
    process = FakeProcess(dies_of=dies_of)
    job = world.stop(process, FORCE)
    job.force(ADMIN)
    if not dies_of:
        with pytest.raises(Failed, match="Job 1 has sent SIGKILL already"):
            job.extend(S, ADMIN)
        for act in (job.hold, job.release):
            with pytest.raises(Failed, match="Job 1 has sent SIGKILL already"):
                act(ADMIN)
        job.force(ADMIN)  # Requested twice.
    world.clock.advance(5)
    for act in (job.hold, job.force):
        with pytest.raises(Failed, match=r"Job 1 has ended already \((killed|survived)\)"):
            act(ADMIN)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("held", [False, True])
def test_another_request_does_not_revoke_a_hold_or_extension(world: World, held: bool) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    if held:
        job.hold(ADMIN)
    else:
        job.extend(60 * S, ADMIN)
    with pytest.raises(Failed, match="held or extended"):
        world.stop(FakeProcess(), FORCE | Flag.NOWAIT)
    assert process.sent == [SIGTERM]
    world.clock.advance(60)
    assert (process.sent == [SIGTERM]) is held


@pytest.mark.parametrize("holds", [True, False])
def test_a_wait_that_ends_late_starts_the_time_again(world: World, holds: bool) -> None:
    """QEMU writes to a full pipe. The wait ends right before the hold or the extension ends."""
    world.sampler.shows = lambda now: ON_PIPE
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(5)
    if holds:
        job.hold(ADMIN)
    else:
        job.extend(398 * S, ADMIN)
    world.clock.advance(396)
    world.sampler.shows = lambda now: IDLE
    world.clock.advance(3)
    if holds:
        job.release(ADMIN)
    world.clock.advance(5)
    assert process.sent == [SIGTERM]
    world.clock.advance(5)
    assert process.sent == [SIGTERM, SIGKILL]
