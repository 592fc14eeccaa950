"""Callers cannot flood the journal, and important entries are never held back."""

from __future__ import annotations

from signal import SIGKILL, SIGTERM

import pytest

from qkilld.engine import events
from qkilld.engine.rate_limit import LIMITED, RateLimitedJournal
from qkilld.engine.registry import Registry
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag
from qkilld.model.event import MessageId
from qkilld.model.job import Request
from qkilld.model.policy import Config

from .conftest import FakeProcess, World, make_guest

ROOT = Steerer(0, Rank.ROOT)


@pytest.fixture
def limited(world: World) -> RateLimitedJournal:
    """The journal of the world's registry."""
    journal = RateLimitedJournal(world.journal, world.clock)
    world.registry = Registry(Config(), world.clock, journal)
    return journal


def test_one_entry_a_second_for_each_job_and_kind(
    world: World, limited: RateLimitedJournal
) -> None:
    one = world.stop(FakeProcess())
    other = world.stop(FakeProcess(make_guest(4712)))
    for _ in range(1000):
        for job in (one, other):
            job.hold(ROOT)
            job.release(ROOT)
    kinds = (MessageId.JOB_HELD, MessageId.JOB_RELEASED)
    assert [world.journal.ids.count(kind) for kind in kinds] == [2, 2]
    world.clock.advance(1)
    assert [world.journal.ids.count(kind) for kind in kinds] == [4, 4]
    counted = [event for event in world.journal.events if "QKILLD_COUNT" in event.fields]
    assert [event.fields["QKILLD_COUNT"] for event in counted] == ["999"] * 4
    assert counted[0].message.endswith("released. (999 of these in a second.)")
    world.clock.advance(1)
    one.hold(ROOT)
    assert [world.journal.ids.count(kind) for kind in kinds] == [5, 4]


def test_the_limit_goes_on_while_the_flood_does(world: World, limited: RateLimitedJournal) -> None:
    job = world.stop(FakeProcess(), Flag.FORCE)
    for _ in range(80):
        job.join(Request(Flag(0)))
        world.clock.advance(0.1)
    assert 8 <= world.journal.ids.count(MessageId.JOB_JOINED) <= 9


def test_a_single_one_held_back_is_written_as_it_is(
    world: World, limited: RateLimitedJournal
) -> None:
    job = world.stop(FakeProcess())
    job.join(Request(Flag(0), uid=1000))
    job.join(Request(Flag(0), uid=1001))
    limited.flush()
    limited.flush()
    joined = [event for event in world.journal.events if event.id is MessageId.JOB_JOINED]
    assert [event.fields["QKILLD_REQUESTED_BY"] for event in joined] == ["1000", "1001"]
    assert "QKILLD_COUNT" not in joined[-1].fields


def test_signals_and_receipts_are_never_held_back(
    world: World, limited: RateLimitedJournal
) -> None:
    assert not LIMITED & {MessageId.SIGNAL_SENT, MessageId.JOB_STARTED, MessageId.JOB_ENDED}
    process = FakeProcess()
    job = world.stop(process)
    job.force(ROOT)
    process.wake()
    assert process.sent == [SIGTERM, SIGKILL]
    assert world.journal.ids.count(MessageId.SIGNAL_SENT) == 2
    assert world.journal.ids[-1] is MessageId.JOB_ENDED


def test_faults_of_the_program_too(world: World, limited: RateLimitedJournal) -> None:
    for _ in range(1000):
        limited.write(events.internal_error("answering Terminate", ValueError()))
        limited.write(events.internal_error("answering Plan", ValueError()))
    assert world.journal.ids == [MessageId.INTERNAL_ERROR] * 2
