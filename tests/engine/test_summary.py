"""One journal entry for all concurrent stops."""

from __future__ import annotations

from dataclasses import replace

from qkilld.engine.events import MAX_NAMED
from qkilld.model.constants import Flag
from qkilld.model.event import Event, MessageId, Priority
from qkilld.model.sample import Node

from .conftest import IDLE, FakeProcess, World, make_guest

MANY = 100


def processes(count: int) -> list[FakeProcess]:
    return [FakeProcess(make_guest(pid=1000 + n, name=f"vm{n}")) for n in range(count)]


def summaries(world: World) -> list[Event]:
    return [event for event in world.journal.events if event.id is MessageId.STOPS_ENDED]


def test_a_shutdown_of_many_guests_is_one_line_and_no_warning(world: World) -> None:
    guests = processes(MANY)
    for process in guests:
        world.stop(process)
    world.clock.advance(3)
    for process in guests[1:]:
        process.die()
    assert summaries(world) == [], "one is left"
    world.clock.advance(2)
    guests[0].die()
    (summary,) = summaries(world)
    assert summary.message == "Stopped 100 guests in 5.000 s: 100 exited. No data is at risk."
    assert summary.fields["QKILLD_STOPS"] == "100"
    assert all(event.priority > Priority.WARNING for event in world.journal.events)


def test_only_those_with_data_at_risk_are_warned_of_and_named(world: World) -> None:
    world.sampler.shows = lambda now: replace(IDLE, nodes=(Node("d0", "nbd", served=False),))
    at_risk = processes(MAX_NAMED + 1)
    for process in at_risk:
        world.stop(process, Flag.FORCE)
    world.clock.advance(3)
    world.sampler.shows = lambda now: IDLE
    fine = FakeProcess(make_guest(pid=2000, name="fine"))
    world.stop(fine)
    for process in (*at_risk, fine):
        process.die()
    (summary,) = summaries(world)
    assert "12 exited" in summary.message
    assert "Data of 11 is at risk: " in summary.message
    assert "vm9" in summary.message and "vm10" not in summary.message
    assert "fine" not in summary.message
    warnings = [event for event in world.journal.events if event.priority <= Priority.WARNING]
    assert {event.guest.label.name for event in warnings if event.guest} == {
        f"vm{n}" for n in range(MAX_NAMED + 1)
    }


def test_one_stop_has_its_receipt_alone(world: World) -> None:
    for process in processes(3):
        world.stop(process)
        process.die()
    assert summaries(world) == []
    # The summary of later stops does not count these.
    pair = processes(2)
    for process in pair:
        world.stop(process)
    for process in pair:
        process.die()
    assert summaries(world)[0].fields["QKILLD_STOPS"] == "2"
