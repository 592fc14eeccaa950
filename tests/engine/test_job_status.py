"""A job's status is the same over the bus and over Varlink."""

from __future__ import annotations

import json
from dataclasses import replace

from qkilld.bus import client
from qkilld.bus.job_object import properties
from qkilld.engine.job import Job
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import INFINITY, Flag, Phase
from qkilld.model.guest_state import Button, GuestObservation
from qkilld.model.job_status import JobStatus
from qkilld.model.sample import Io
from qkilld.model.varlink_state import status_of
from qkilld.varlink.values import state

from .conftest import IDLE, FakeProcess, S, World


def job_status(job: Job) -> JobStatus:
    """Return the status as qkilld-stop gets it over Varlink."""
    return status_of(json.loads(json.dumps(state(job, 0))))


def test_the_bus_carries_all_of_it(world: World) -> None:
    world.sampler.shows = lambda now: replace(IDLE, io=Io(0, 0, 0, 0, 0, now, 0))
    process = FakeProcess()
    job = world.stop(process, Flag.FORCE)
    path = "/org/qkilld1/job/1"

    def check() -> None:
        received = client.job_status(path, properties(job, private=True))
        assert (received.receipt is None) == job.running
        assert replace(received, receipt=None) == replace(job_status(job), path=path)

    check()
    world.clock.advance(5)
    status = job_status(job)
    assert status.bytes_written is not None and status.last_progress is not None
    check()
    assert status.not_before == 0
    for span in (60 * S, INFINITY):
        job.extend(span, Steerer(0, Rank.ROOT))
        check()
    # "At least infinity more" must not become "at least nothing more".
    assert job_status(job).not_before == INFINITY
    job.hold(Steerer(0, Rank.ROOT))
    assert job_status(job).deadline == INFINITY
    check()
    process.die()
    assert job_status(job).result == "exited" and job_status(job).phase == Phase.DONE
    check()


def test_the_bus_carries_the_reaction_of_the_guest(world: World) -> None:
    world.monitors.shows = lambda now: GuestObservation(
        at=now, runstate="running", button=Button.LISTENED, requests=0, vcpu_time=0
    )
    job = world.stop(FakeProcess(), Flag.POWERDOWN, powerdown_only=True)
    world.clock.advance(3)
    status = client.job_status("", properties(job, private=True))
    assert status == job_status(job)
    assert (status.doing, status.powerdown_only) == ("was asked to shut down", True)


def test_unknown_values_are_none(world: World) -> None:
    world.sampler.shows = lambda now: None
    job = world.stop(FakeProcess())
    received = client.job_status("", properties(job, private=True))
    assert (received.bytes_written, received.bytes_pending, received.last_progress) == (None,) * 3


def test_without_a_next_rung_there_is_no_standstill(world: World) -> None:
    world.sampler.shows = lambda now: replace(IDLE, io=Io(0, 0, 0, 0, 0, now, 0))
    spans = dict.fromkeys(("grace", "stall", "storage_stall", "max"), INFINITY)
    job = world.stop(FakeProcess(), Flag.FORCE, spans=spans)
    world.clock.advance(5)
    status = job_status(job)
    assert (status.deadline, status.standstill) == (INFINITY, 0)
    # Other implementations of JSON may have only signed 64-bit numbers.
    assert str(INFINITY) not in json.dumps(state(job, 0))
    assert replace(status, path="p") == client.job_status("p", properties(job, private=True))


def test_a_daemon_that_is_older(world: World) -> None:
    older = properties(world.stop(FakeProcess(), Flag.FORCE), private=True)
    newer = ("NextRung", "NextRungStallUSec", "Reasons", "Rate", "Reason", "RequestedBy")
    for name in ("NotBeforeUSec", "GuestAsked", "PowerdownOnly", *newer, "EndedUSec", "Receipt"):
        del older[name]
    status = client.job_status("", older)
    assert (status.not_before, status.guest_asked, status.powerdown_only) == (0, "not-asked", False)
