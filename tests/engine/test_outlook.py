"""The next rung of a job, and what it waits for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from qkilld.engine.job import Job
from qkilld.engine.outlook import Outlook, outlook, reasons
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag, GuestAsked, NextRung, Phase
from qkilld.model.guest_state import Button, GuestObservation
from qkilld.model.sample import Io, Sample, Socket

from .conftest import IDLE, NO_FLAGS, FakeProcess, S, World, make_guest

ROOT = Steerer(0, Rank.ROOT)
NBD = Socket(7, "unix", True, 0, 0, role="unknown")


PIDS = itertools.count(4711)


def another(**options: Any) -> FakeProcess:
    """Return a process with a new id."""
    return FakeProcess(make_guest(next(PIDS)), **options)


def writes(now: int) -> Sample:
    return replace(IDLE, at=now, io=Io(0, 0, 0, 0, 0, now, 0))


def waits(now: int) -> Sample:
    return replace(IDLE, at=now, sockets=(NBD,))


def test_as_long_as_it_moves_sigkill_waits_for_a_standstill(world: World) -> None:
    world.sampler.shows = writes
    job = world.stop(another(), Flag.FORCE)
    for _ in range(30):
        world.clock.advance(1)
        assert outlook(job).rung is NextRung.KILL
    policy = job.policy
    assert outlook(job) == Outlook(NextRung.KILL, policy.stall)
    # Without FORCE, the job gives up, ReapSec= after the time at which it would send SIGKILL.
    lax = world.stop(another(), NO_FLAGS)
    world.clock.advance(30)
    assert outlook(lax) == Outlook(NextRung.GIVE_UP, policy.stall + policy.reap)


@pytest.mark.parametrize("flags", [Flag.POWERDOWN, Flag.POWERDOWN | Flag.NOWAIT])
def test_no_sigterm_is_announced_for_a_job_that_only_asks(world: World, flags: Flag) -> None:
    busy = GuestObservation(at=0, runstate="running", button=Button.LISTENED, disks_idle=0)
    world.monitors.shows = lambda now: busy
    job = world.stop(another(), flags)
    world.clock.advance(0.5)
    assert outlook(job).rung is NextRung.ASK
    job.guest_asked = GuestAsked.IGNORED
    expected = NextRung.GIVE_UP if Flag.NOWAIT in flags else NextRung.TERMINATE
    assert outlook(job).rung is expected


def test_of_storage_it_is_the_longer_span(world: World) -> None:
    world.sampler.shows = waits
    job = world.stop(another(), Flag.FORCE)
    world.clock.advance(20)
    assert outlook(job) == Outlook(NextRung.KILL, job.policy.storage_stall)
    assert reasons(job) and "unknown use" in reasons(job)[0]


def test_a_clock_that_runs_is_told_as_one(world: World) -> None:
    """Progress does not delay the deadlines of FIXED, MaxSec= and an extension, nor the deadline
    after SIGKILL."""
    world.sampler.shows = writes
    fixed = world.stop(another(), Flag.FORCE | Flag.FIXED)
    assert outlook(fixed) == Outlook(NextRung.KILL)
    bounded = world.stop(another(), Flag.FORCE, spans={"max": 15 * S})
    extended = world.stop(another(), Flag.FORCE)
    extended.extend(3600 * S, ROOT)
    world.clock.advance(8)
    assert outlook(bounded) == Outlook(NextRung.KILL)
    assert outlook(extended) == Outlook(NextRung.KILL)
    assert bounded.deadline == bounded.started + 15 * S
    stuck = another(dies_of=())
    killed = world.stop(stuck, Flag.FORCE)
    killed.force(ROOT)
    assert outlook(killed) == Outlook(NextRung.GIVE_UP)
    stuck.die()
    assert outlook(killed) == Outlook(NextRung.NONE)


def test_while_the_guest_is_asked(world: World) -> None:
    world.monitors.shows = lambda now: GuestObservation(
        at=now, runstate="running", button=Button.LISTENED, requests=0, vcpu_time=0
    )
    job = world.stop(another(), Flag.POWERDOWN)
    assert outlook(job) == Outlook(NextRung.ASK)
    world.clock.advance(3)
    assert job.phase is Phase.POWERDOWN
    assert outlook(job) == Outlook(NextRung.TERMINATE, job.policy.powerdown)
    assert reasons(job) == job.history[-1].reasons
    only = world.stop(another(), Flag.POWERDOWN, powerdown_only=True, ask_at_most=30 * S)
    world.clock.advance(3)
    assert outlook(only) == Outlook(NextRung.GIVE_UP)


def test_a_client_sees_the_deadline_from_sigterm_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host, `follow` is called late. In the meantime, qkillctl used to show "waits
    without limit"."""
    monkeypatch.setattr(Job, "follow", lambda job: None)
    job = world.stop(another(), Flag.FORCE)
    assert [rung.action for rung in job.rungs] == ["SIGTERM"]
    assert job.deadline == job.started + job.policy.grace
