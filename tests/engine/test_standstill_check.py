"""The check whether QEMU can run takes only a part of the time for asking the guest."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGCONT, SIGTERM

import pytest

from qkilld.engine.job import Job
from qkilld.engine.sampling import TIMEOUT
from qkilld.engine.standstill_check import MAX_SAMPLES
from qkilld.model.constants import Flag, GuestAsked
from qkilld.model.guest_state import GuestObservation, GuestOrder

from .conftest import IDLE, FakeProcess, S, World
from .test_powerdown import STOPPED, UP, asked_world


@pytest.mark.parametrize(("ask_s", "asked_s"), [(2, 1), (5, 1), (9, 3), (60, MAX_SAMPLES)])
def test_waiting_for_a_sample_takes_a_third_of_the_time_for_asking(
    ask_s: int, asked_s: int
) -> None:
    """Even with little time, the check waits for one sample until that sample times out."""
    world, process = asked_world(UP), FakeProcess()
    world.sampler.shows = lambda now: None
    world.stop(process, Flag.POWERDOWN, ask_at_most=ask_s * S)
    world.clock.advance(asked_s * TIMEOUT / S - 0.1)
    assert world.monitors.orders == []
    world.clock.advance(0.2)
    assert (process.sent, world.monitors.orders) == ([], [GuestOrder.BUTTON])


SILENT = replace(UP, runstate=None)


def stopped_world(resume: bool) -> tuple[World, FakeProcess, Job]:
    """Return a guest whose monitor answers once. Then its process is stopped."""
    world, process = asked_world(replace(UP, disks_idle=0)), FakeProcess()
    job = world.stop(process, Flag.POWERDOWN, help=(GuestOrder.RESUME,) if resume else ())
    world.clock.advance(0.1)
    assert (job.guest_asked, world.monitors.orders) == (GuestAsked.NOT_ASKED, [])
    world.sampler.shows = lambda now: IDLE if SIGCONT in process.sent else STOPPED
    world.monitors.shows = lambda now: UP if SIGCONT in process.sent else SILENT
    return world, process, job


def test_a_process_that_is_stopped_before_the_guest_was_asked() -> None:
    world, process, job = stopped_world(resume=False)
    world.clock.advance(6)
    assert (process.sent[0], job.guest_asked) == (SIGTERM, GuestAsked.NOT_RUNNING)
    assert any("it is stopped (SIGSTOP)" in turn.reasons[0] for turn in job.history)


@pytest.mark.parametrize("silent_s", [0, 3])
def test_a_process_that_is_stopped_before_the_guest_was_asked_is_continued(silent_s: int) -> None:
    """The monitor may need time to answer again."""
    world, process, _ = stopped_world(resume=True)
    continued: list[int] = []

    def show(now: int) -> GuestObservation:
        if SIGCONT in process.sent:
            continued.append(now)
        return UP if continued and now >= continued[0] + silent_s * S else SILENT

    world.monitors.shows = show
    world.clock.advance(8 + silent_s)
    assert (process.sent, world.monitors.orders) == ([SIGCONT], [GuestOrder.BUTTON])


def test_a_stopped_process_of_which_the_first_samples_come_late() -> None:
    """The monitor cannot be opened, but that does not make the guest unreachable."""
    world, process = World(), FakeProcess()
    began = world.clock.now()
    late = MAX_SAMPLES * TIMEOUT
    world.sampler.shows = lambda now: STOPPED if now >= began + late else None
    job = world.stop(process, Flag.POWERDOWN)
    world.clock.advance(MAX_SAMPLES + 1)
    assert (process.sent[0], job.guest_asked) == (SIGTERM, GuestAsked.NOT_RUNNING)
