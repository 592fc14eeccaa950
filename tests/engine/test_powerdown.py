"""A job that asks the guest first: the orders, the time of SIGTERM, and the receipt."""

from __future__ import annotations

import os
from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGTERM

import pytest

from qkilld.engine.job_saver import JobSaver
from qkilld.engine.monitor_link import MonitorLink
from qkilld.engine.sampling import TIMEOUT
from qkilld.engine.snapshot import decode
from qkilld.engine.standstill_check import MAX_SAMPLES
from qkilld.model.access import Rank, Steerer
from qkilld.model.block_state import BackgroundJob, BlockState
from qkilld.model.constants import INFINITY, Flag, GuestAsked, Phase, Result, Verdict
from qkilld.model.event import MessageId
from qkilld.model.guest_state import (
    Button,
    GuestObservation,
    GuestOrder,
    KeptMonitor,
    ShutdownSign,
)
from qkilld.model.job import Control, Request
from qkilld.model.sample import Cgroup, Sample
from tests.engine.conftest import IDLE, FakeProcess, S, World
from tests.engine.test_service import FakeStore
from tests.evidence.until import until

POWERDOWN, FORCE, NOWAIT = Flag.POWERDOWN, Flag.FORCE, Flag.NOWAIT
UP = GuestObservation(
    at=0,
    runstate="running",
    button=Button.LISTENED,
    press_pending=False,
    requests=100,
    disks_idle=60 * S,
    vcpu_time=0,
)
DEAF = replace(UP, button=Button.NOT_LISTENED)
ROOT = Steerer(0, Rank.ROOT)


def asked_world(seen: GuestObservation) -> World:
    world = World()
    world.monitors.shows = lambda now: seen
    return world


def test_a_guest_that_shuts_down_gets_no_signal() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE)
    assert (job.phase, process.sent) == (Phase.POWERDOWN, [])
    world.clock.advance(0.1)
    assert world.monitors.orders == [GuestOrder.BUTTON]
    closing = replace(UP, signs=frozenset({ShutdownSign.AGENT_CLOSED}), requests=500)
    world.monitors.shows = lambda now: replace(closing, requests=now)
    world.clock.advance(5)
    assert job.verdict is Verdict.GUEST_SHUTDOWN
    world.clock.advance(300)
    assert process.sent == []
    process.die()
    assert (job.result, job.guest_asked) == (Result.EXITED, GuestAsked.SHUT_DOWN)
    assert [rung.action for rung in job.rungs] == ["button"]
    assert world.monitors.open_monitors == 0
    assert MessageId.GUEST_ASKED in world.journal.ids


@pytest.mark.parametrize(
    ("rest", "outcome"),
    [
        ((frozenset({ShutdownSign.POWERED_OFF}), True), GuestAsked.SHUT_DOWN),
        ((frozenset[ShutdownSign](), True), GuestAsked.ASKED),
    ],
)
def test_a_guest_that_is_gone_before_the_reply_was_asked(
    rest: tuple[frozenset[ShutdownSign], bool], outcome: GuestAsked
) -> None:
    """A small guest powers off within milliseconds, so its exit is noticed first."""
    world, process = asked_world(UP), FakeProcess()
    world.monitors.rest = rest
    world.monitors.on_order = lambda order: process.die()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(0.1)
    assert (job.result, job.guest_asked) == (Result.EXITED, outcome)
    assert [rung.action for rung in job.rungs] == ["button"]
    assert process.sent == []
    assert world.journal.ids.count(MessageId.GUEST_ASKED) == 1


def test_a_guest_that_ignores_the_button_gets_sigterm_after_powerdown_sec() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE)
    assert job.deadline == INFINITY
    world.clock.advance(0.1)
    assert job.deadline == job.rungs[-1].at + 60 * S
    world.clock.advance(58.9)
    assert process.sent == []
    world.clock.advance(3)
    assert (process.sent, job.phase) == ([SIGTERM], Phase.TERMINATE)
    assert job.guest_asked is GuestAsked.IGNORED
    # The monitor stays open, because QEMU does not answer a connection made after SIGTERM.
    assert world.monitors.open_monitors == 1
    world.clock.advance(60)
    assert process.sent == [SIGTERM, SIGKILL]
    process.die()
    assert (job.running, world.monitors.open_monitors) == (False, 0)


def test_time_for_asking_ends_even_if_the_guest_is_shutting_down() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN, ask_at_most=20 * S)
    world.clock.advance(1)
    world.monitors.shows = lambda now: replace(
        UP, signs=frozenset({ShutdownSign.AGENT_CLOSED}), requests=now
    )
    world.clock.advance(18)
    assert (job.verdict, process.sent) == (Verdict.GUEST_SHUTDOWN, [])
    assert job.deadline == job.started + 20 * S
    world.clock.advance(1)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)


def test_a_guest_that_is_given_no_time_is_not_asked() -> None:
    world, process = asked_world(replace(UP, disks_idle=0)), FakeProcess()
    job = world.stop(process, POWERDOWN, ask_at_most=0)
    world.clock.advance(0.01)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.NOT_ASKED)


def test_a_call_that_joins_may_end_asking_earlier_and_not_later() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(2)
    job.join(Request(POWERDOWN, ask_at_most=10 * S))
    job.join(Request(POWERDOWN, ask_at_most=15 * S))
    world.clock.advance(7)
    assert process.sent == []
    world.clock.advance(1)
    assert process.sent == [SIGTERM]


def test_a_caller_without_the_right_to_steer_cannot_end_asking() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN, uid=0)
    job.join(Request(POWERDOWN, uid=1000, ask_at_most=0))
    world.clock.advance(30)
    assert process.sent == []


def test_a_call_without_powerdown_only_has_signals_follow() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN, powerdown_only=True)
    world.clock.advance(2)
    job.join(Request(POWERDOWN, powerdown_only=True))
    assert job.request.powerdown_only
    job.join(Request(POWERDOWN | FORCE))
    world.clock.advance(61)
    assert process.sent == [SIGTERM]


def test_a_hold_outlasts_the_time_for_asking() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN, ask_at_most=10 * S)
    job.hold(ROOT)
    world.clock.advance(30)
    assert process.sent == []
    job.release(ROOT)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]


def test_a_deaf_idle_guest_is_known_in_seconds() -> None:
    world, process = asked_world(DEAF), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(5)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.DEAF)
    assert world.monitors.orders == []


def test_a_guest_without_a_monitor_gets_sigterm_at_once() -> None:
    world, process = World(), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(0.01)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.UNREACHABLE)


def test_the_agent_first_and_then_the_button() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.has_agent = True
    world.stop(process, POWERDOWN)
    world.clock.advance(2)
    assert world.monitors.orders == [GuestOrder.AGENT]
    world.clock.advance(11)
    assert world.monitors.orders == [GuestOrder.AGENT, GuestOrder.BUTTON]


def test_an_agent_that_refuses_is_no_reason_not_to_press() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.has_agent = True
    world.monitors.refuses = {GuestOrder.AGENT}
    job = world.stop(process, POWERDOWN)
    world.clock.advance(2)
    assert world.monitors.orders == [GuestOrder.AGENT, GuestOrder.BUTTON]
    assert [rung.action for rung in job.rungs] == ["button"]


@pytest.mark.parametrize("lasts", [False, True])
def test_a_button_that_could_not_be_pressed_is_tried_once_more(lasts: bool) -> None:
    """The monitor may have been lost at that moment."""
    world, process = asked_world(UP), FakeProcess()
    world.monitors.refuses = {GuestOrder.BUTTON}
    job = world.stop(process, POWERDOWN)
    world.clock.advance(0.1)
    assert (world.monitors.orders, process.sent) == ([GuestOrder.BUTTON], [])
    if not lasts:
        world.monitors.refuses = set()
    world.clock.advance(5)
    assert world.monitors.orders == [GuestOrder.BUTTON] * 2
    outcome = GuestAsked.UNREACHABLE if lasts else GuestAsked.ASKED
    assert (job.guest_asked, process.sent) == (outcome, [SIGTERM] if lasts else [])


def test_a_guest_that_is_paused_while_it_shuts_down_is_resumed_if_that_is_allowed() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.stop(process, POWERDOWN, help=(GuestOrder.RESUME,))
    world.clock.advance(2)
    world.monitors.shows = lambda now: replace(UP, runstate="paused")
    world.clock.advance(2)
    assert world.monitors.orders == [GuestOrder.BUTTON, GuestOrder.RESUME]


@pytest.mark.parametrize(
    ("runstate", "order"), [("paused", GuestOrder.RESUME), ("suspended", GuestOrder.WAKE)]
)
def test_a_guest_that_does_not_run_is_helped_only_if_that_is_allowed(
    runstate: str, order: GuestOrder
) -> None:
    world, process = asked_world(replace(UP, runstate=runstate)), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.NOT_RUNNING)
    world, process = asked_world(replace(UP, runstate=runstate)), FakeProcess()

    def run(what: GuestOrder) -> None:
        if what is order:
            world.monitors.shows = lambda now: UP

    world.monitors.on_order = run
    world.stop(process, POWERDOWN, help=(order,))
    world.clock.advance(3)
    assert world.monitors.orders == [order, GuestOrder.BUTTON]
    assert process.sent == []


def test_a_human_monitor_is_never_said_to_flush() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.reads_disks = False
    job = world.stop(process, POWERDOWN)
    world.clock.advance(61)
    assert process.sent == [SIGTERM]
    assert "human monitor" in job.flush.reason and job.flush.outcome == "left-out"
    assert world.observer.seen == ["powerdown", "terminate"]
    # But a QEMU whose guest has powered off is told to quit.
    off, other = asked_world(UP), FakeProcess()
    off.monitors.reads_disks = False
    off.stop(other, POWERDOWN)
    off.clock.advance(1)
    off.monitors.shows = lambda now: replace(UP, runstate="shutdown")
    off.clock.advance(1.1)
    assert off.monitors.orders == [GuestOrder.BUTTON, GuestOrder.QUIT]


STOPPED = replace(IDLE, state="T")
FROZEN = replace(IDLE, cgroup=Cgroup(True, 0, 0, 0, 0, frozen=True))


@pytest.mark.parametrize(
    ("sample", "help", "why"),
    [
        (STOPPED, (), "it is stopped (SIGSTOP), so its guest cannot be asked"),
        (STOPPED, (GuestOrder.WAKE, GuestOrder.THAW), "the option resume continues it first"),
        (FROZEN, (GuestOrder.RESUME,), "its control group is frozen, so its guest cannot be asked"),
        (replace(STOPPED, tracer=7), (GuestOrder.RESUME,), "a debugger holds it (process 7)"),
    ],
)
def test_a_stopped_process_is_not_continued_unless_that_is_allowed_and_helps(
    sample: Sample, help: tuple[GuestOrder, ...], why: str
) -> None:
    world, process = asked_world(UP), FakeProcess()
    world.sampler.shows = lambda now: sample
    job = world.stop(process, POWERDOWN | FORCE, help=help)
    world.clock.advance(0)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.NOT_RUNNING)
    assert (world.monitors.orders, world.monitors.open_monitors) == ([], 0)
    assert job.history[0].verdict is Verdict.STOPPED and why in job.history[0].reasons[0]
    ended = [event for event in world.journal.events if event.id is MessageId.ASKING_ENDED]
    assert len(ended) == 1 and why in ended[0].message


def continued_world() -> tuple[World, FakeProcess]:
    world, process = asked_world(UP), FakeProcess()
    world.sampler.shows = lambda now: IDLE if SIGCONT in process.sent else STOPPED
    return world, process


def test_with_resume_a_stopped_process_is_continued_and_then_asked() -> None:
    world, process = continued_world()
    job = world.stop(process, POWERDOWN | FORCE, help=(GuestOrder.RESUME,))
    assert process.sent == [SIGCONT]
    world.clock.advance(0.9)
    # Work right after SIGCONT is not the guest's usual work, so it is observed for 1 s first.
    assert world.monitors.orders == []
    world.clock.advance(0.3)
    assert world.monitors.orders == [GuestOrder.BUTTON]
    assert [(rung.phase, rung.action) for rung in job.rungs] == [
        (Phase.POWERDOWN, "SIGCONT"),
        (Phase.POWERDOWN, "button"),
    ]
    process.die()
    assert (job.result, process.sent) == (Result.EXITED, [SIGCONT])


def test_the_next_daemon_does_not_take_sigcont_for_a_request() -> None:
    world, process = continued_world()
    job = world.stop(process, POWERDOWN, help=(GuestOrder.RESUME,))
    saved = decode(replace(job.snapshot(), asking=None).to_json())
    later, same = asked_world(UP), FakeProcess()
    resumed = later.registry.resume(same, saved)
    later.clock.advance(2)
    assert later.monitors.orders == [GuestOrder.BUTTON]
    assert [rung.action for rung in resumed.rungs] == ["SIGCONT", "button"]


def test_a_held_job_does_not_continue_the_process() -> None:
    world, process = continued_world()
    job = world.stop(process, POWERDOWN, help=(GuestOrder.RESUME,))
    held = decode(replace(job.snapshot(), rungs=(), control=Control(held=True)).to_json())
    later, same = asked_world(UP), FakeProcess()
    later.sampler.shows = lambda now: IDLE if SIGCONT in same.sent else STOPPED
    resumed = later.registry.resume(same, held)
    later.clock.advance(5)
    assert same.sent == []
    resumed.release(ROOT)
    later.clock.advance(3)
    assert (same.sent, later.monitors.orders) == ([SIGCONT], [GuestOrder.BUTTON])


def test_a_process_that_is_not_qemu_any_more_is_not_continued() -> None:
    world, process = continued_world()
    world.sampler.shows = lambda now: None
    job = world.stop(process, POWERDOWN, help=(GuestOrder.RESUME,))
    process.guest = replace(process.guest, identity=replace(process.guest.identity, uid=2000))
    (answer,) = world.sampler.late
    answer(replace(STOPPED, at=world.clock.now()))
    world.clock.advance(0)
    assert (process.sent, job.result) == ([], Result.FAILED)


def test_a_late_sample_does_not_show_that_the_process_can_run() -> None:
    """On a busy host, two samples may come late. Here the third comes in time."""
    world, process = continued_world()
    shows, began = world.sampler.shows, world.clock.now()
    world.sampler.shows = lambda now: None if now < began + 2 * S else shows(now)
    world.stop(process, POWERDOWN | FORCE, help=(GuestOrder.RESUME,))
    world.clock.advance(1.9)
    assert (process.sent, world.monitors.orders) == ([], [])
    world.clock.advance(2)
    assert (process.sent, world.monitors.orders) == ([SIGCONT], [GuestOrder.BUTTON])


@pytest.mark.parametrize("sample", [None, Sample(0, "?")])
def test_without_any_sample_the_guest_is_asked_in_the_end(sample: Sample | None) -> None:
    world, process = asked_world(UP), FakeProcess()
    world.sampler.shows = lambda now: sample
    world.stop(process, POWERDOWN)
    world.clock.advance(MAX_SAMPLES * TIMEOUT / S + 1)
    assert (process.sent, world.monitors.orders) == ([], [GuestOrder.BUTTON])


def test_cancel_before_the_sample_continues_nothing() -> None:
    world, process = continued_world()
    world.sampler.shows = lambda now: None
    job = world.stop(process, POWERDOWN, help=(GuestOrder.RESUME,))
    job.cancel()
    world.clock.advance(5)
    assert (process.sent, job.result, world.sampler.closed) == ([], Result.CANCELLED, 1)


def test_a_guest_that_has_powered_off_has_its_qemu_told_to_quit() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    off = replace(UP, runstate="shutdown", signs=frozenset({ShutdownSign.POWERED_OFF}))
    world.monitors.shows = lambda now: off
    world.clock.advance(1.2)
    assert world.monitors.orders == [GuestOrder.BUTTON, GuestOrder.QUIT]
    assert (job.phase, process.sent) == (Phase.QUIT, [])
    world.clock.advance(2.1)
    assert process.sent == [SIGTERM]
    process.die()
    assert (job.result, job.guest_asked) == (Result.EXITED, GuestAsked.SHUT_DOWN)
    assert [rung.action for rung in job.rungs] == ["button", "quit", "SIGTERM"]


def test_powerdown_only_never_goes_further() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE, powerdown_only=True)
    world.clock.advance(62)
    assert (job.result, process.sent) == (Result.SURVIVED, [])
    assert job.guest_asked is GuestAsked.IGNORED


def test_with_nowait_it_is_asked_once_and_no_signal_sent() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(1)
    assert (job.result, process.sent) == (Result.SIGNALLED, [])
    assert world.monitors.orders == [GuestOrder.BUTTON]
    # The job does not watch whether the guest shuts down.
    assert job.guest_asked is GuestAsked.ASKED
    world, process = World(), FakeProcess()
    job = world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(1)
    assert (job.result, job.error, process.sent) == (Result.FAILED, "it has no monitor", [])


@pytest.mark.parametrize(
    ("max_s", "asked_s"),
    [(25, 15), (20, 10), (12, 6)],
    ids=["grace", "half", "less than two graces"],
)
def test_max_counts_from_the_start_of_the_job_and_leaves_sigterm_its_grace(
    max_s: int, asked_s: int
) -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE, spans={"max": max_s * S})
    world.sampler.shows = lambda now: None
    world.clock.advance(asked_s - 0.1)
    assert (process.sent, job.deadline) == ([], job.started + asked_s * S)
    world.clock.advance(0.2)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)
    world.clock.advance(max_s - asked_s - 0.2)
    assert process.sent == [SIGTERM]
    world.clock.advance(2)
    assert process.sent == [SIGTERM, SIGKILL]


def test_a_sigterm_that_comes_after_max_has_its_grace() -> None:
    """Root holds the job for longer than MaxSec=."""
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE, spans={"max": 30 * S})
    job.hold(ROOT)
    world.clock.advance(100)
    job.release(ROOT)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]
    world.clock.advance(9)
    assert process.sent == [SIGTERM]
    world.clock.advance(3)
    assert process.sent == [SIGTERM, SIGKILL]


def test_asking_alone_has_all_of_max() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN, powerdown_only=True, spans={"max": 20 * S})
    world.clock.advance(19)
    assert job.running
    world.clock.advance(2)
    assert (job.result, process.sent) == (Result.SURVIVED, [])


def test_a_hold_keeps_sigterm_back_and_force_does_not_wait() -> None:
    world, process = asked_world(DEAF), FakeProcess()
    job = world.stop(process, POWERDOWN)
    job.hold(ROOT)
    world.clock.advance(100)
    assert process.sent == []
    job.release(ROOT)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    job.force(ROOT)
    assert process.sent == [SIGKILL]
    assert world.monitors.open_monitors == 0


def test_cancel_closes_the_monitor() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    job.cancel()
    assert (job.result, process.sent, world.monitors.open_monitors) == (Result.CANCELLED, [], 0)


def test_a_crash_while_the_guest_is_asked_presses_no_second_time() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(10)
    assert world.monitors.orders == [GuestOrder.BUTTON]
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(20)
    after.monitors.shows = lambda now: UP
    again = FakeProcess()
    resumed = after.registry.resume(again, past)
    after.clock.advance(30)
    assert (resumed.phase, again.sent) == (Phase.POWERDOWN, [])
    assert after.monitors.orders == []
    after.clock.advance(15)
    assert (again.sent, resumed.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)


def test_a_hold_of_roots_outlasts_max() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE, spans={"max": 20 * S})
    world.clock.advance(1)
    job.hold(ROOT)
    world.clock.advance(300)
    assert process.sent == []
    job.release(ROOT)
    world.clock.advance(1)
    assert process.sent[:1] == [SIGTERM]


def test_a_hold_keeps_the_button_back() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    job.hold(ROOT)
    world.clock.advance(20)
    assert world.monitors.orders == []
    job.release(ROOT)
    world.clock.advance(2)
    assert world.monitors.orders == [GuestOrder.BUTTON]


def test_root_does_not_wait_for_the_span_of_the_owner() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.stop(process, POWERDOWN, uid=1000, spans={"powerdown": INFINITY})
    world.clock.advance(100)
    job = world.stop(FakeProcess(), POWERDOWN | FORCE)
    world.clock.advance(2)
    assert process.sent == [SIGTERM]
    assert job.guest_asked is GuestAsked.IGNORED


@pytest.mark.parametrize("uid", [0, 1000])
def test_joining_a_powerdown_only_job_stops_the_guest(uid: int) -> None:
    world, process = asked_world(UP), FakeProcess()
    world.stop(process, POWERDOWN, uid=uid, powerdown_only=True)
    world.clock.advance(1)
    world.stop(FakeProcess(), POWERDOWN | NOWAIT)
    world.stop(FakeProcess(), POWERDOWN, powerdown_only=True)
    job = world.stop(FakeProcess(), POWERDOWN | FORCE)
    world.clock.advance(62)
    assert (job.running, process.sent) == (True, [SIGTERM])


def test_joining_a_single_press_stops_the_guest() -> None:
    working = replace(DEAF, requests=None)
    world, process = asked_world(working), FakeProcess()
    world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(1)
    job = world.stop(FakeProcess(), POWERDOWN | FORCE)
    world.monitors.shows = lambda now: UP
    world.clock.advance(5)
    assert job.running and world.monitors.orders[0] is GuestOrder.BUTTON
    world.clock.advance(65)
    assert (job.running, process.sent) == (True, [SIGTERM])


def test_a_monitor_that_the_next_daemon_cannot_reach_is_no_reason_for_sigterm() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(10)
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(20)
    again = FakeProcess()
    resumed = after.registry.resume(again, past)
    after.clock.advance(10)
    assert (resumed.phase, again.sent) == (Phase.POWERDOWN, [])
    after.monitors.shows = lambda now: UP
    after.clock.advance(2)
    assert after.monitors.open_monitors == 1
    after.monitors.rest = frozenset({ShutdownSign.POWERED_OFF}), True
    again.die()
    assert (resumed.result, resumed.guest_asked) == (Result.EXITED, GuestAsked.SHUT_DOWN)
    assert after.monitors.open_monitors == 0


def test_a_qemu_that_crashes_has_not_shut_down() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(3)
    assert job.guest_asked is GuestAsked.ASKED
    world.monitors.rest = frozenset(), True
    process.die()
    assert (job.result, job.guest_asked) == (Result.EXITED, GuestAsked.ASKED)


@pytest.mark.parametrize(
    ("killer", "outcome"), [(0, GuestAsked.SHUT_DOWN), (SIGKILL, GuestAsked.ASKED)]
)
def test_a_qemu_that_somebody_else_kills_has_not_shut_down(
    killer: int, outcome: GuestAsked
) -> None:
    """A human monitor reports no shutdown, so the guest's reaction counts."""
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(2)
    world.monitors.shows = lambda now: replace(UP, requests=100 + 30 * now // S)
    world.clock.advance(8)
    process.die(killer)
    assert (job.result, job.guest_asked) == (Result.EXITED, outcome)


def test_a_shutdown_is_read_of_a_monitor_whose_qemu_has_exited() -> None:
    """QEMU sends its last event and exits before the job has read the event."""
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(3)
    world.monitors.rest = frozenset({ShutdownSign.POWERED_OFF}), True
    process.die()
    assert job.guest_asked is GuestAsked.SHUT_DOWN


def test_the_baseline_goes_on_in_the_next_daemon() -> None:
    """The daemon restarts during a shutdown that takes longer than PowerdownSec=. The guest has no
    agent, so only its work, compared with the baseline, shows that it is shutting down."""
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(2)
    began = world.clock.now()
    world.monitors.shows = lambda now: replace(UP, requests=100 + 30 * (now - began) // S)
    world.clock.advance(8)
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(12)
    after.monitors.shows = world.monitors.shows
    again = FakeProcess()
    resumed = after.registry.resume(again, past)
    after.clock.advance(120)
    assert (resumed.phase, again.sent) == (Phase.POWERDOWN, [])
    assert resumed.verdict is Verdict.GUEST_SHUTDOWN
    assert after.monitors.orders == []


def test_a_connection_that_was_kept_is_gone_on_with() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE)
    world.clock.advance(62)
    past = decode(job.snapshot().to_json())
    assert (process.sent, past.own_chardevs) == ([SIGTERM], ("monitor",))
    after = World()
    after.clock.advance(63)
    after.monitors.shows = lambda now: UP
    again = FakeProcess()
    after.registry.resume(again, past, KeptMonitor(99, past.own_chardevs))
    after.clock.advance(1)
    assert after.monitors.adopted == [KeptMonitor(99, ("monitor",))]
    assert after.monitors.open_monitors == 1
    again.die()
    assert after.monitors.open_monitors == 0


def test_a_connection_that_was_kept_is_not_lost_if_two_phases_open_it() -> None:
    """If the connection was lost, systemd's copy would stay, and QEMU would serve no other one."""
    world = asked_world(UP)
    opened: list[object] = []
    link = MonitorLink(FakeProcess(), world.monitors, "", opened.append)
    link.keep(KeptMonitor(99, ("monitor",)))
    link.open(lambda found: opened.append("first"), was_asked=True)
    link.open(lambda found: opened.append("second"), was_asked=True)
    world.clock.advance(1)
    assert link.monitor is not None and link.monitor.adopted
    assert opened == ["second"]


@pytest.mark.parametrize(
    ("signs", "outcome"),
    [
        (frozenset({ShutdownSign.POWERED_OFF}), GuestAsked.SHUT_DOWN),
        (frozenset[ShutdownSign](), GuestAsked.ASKED),
    ],
)
def test_a_guest_that_ends_while_no_daemon_runs(
    signs: frozenset[ShutdownSign], outcome: GuestAsked
) -> None:
    """The connection that systemd kept contains QEMU's last events."""
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE)
    world.clock.advance(2)
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(5)
    after.monitors.rest = signs, False
    read, write = os.pipe()
    resumed = after.registry.resume(None, past, KeptMonitor(read, past.own_chardevs))
    assert (resumed.result, resumed.guest_asked) == (Result.EXITED, outcome)

    def has_reader() -> bool:
        try:
            os.write(write, b"x")
        except BrokenPipeError:
            return False
        return True

    until(has_reader, lambda one: not one)
    os.close(write)


@pytest.mark.parametrize("asked", [False, True])
def test_a_fault_in_qkilld_ends_asking_though_no_span_does(asked: bool) -> None:
    world, process = asked_world(UP), FakeProcess()
    spans = {"powerdown": INFINITY}
    job = world.stop(process, POWERDOWN, spans=spans)
    if asked:
        world.clock.advance(2)
    world.monitors.fault = ZeroDivisionError("a fault")
    world.clock.advance(2)
    assert MessageId.INTERNAL_ERROR in world.journal.ids
    if asked:
        # The guest may be shutting down, so it gets PowerdownSec=.
        assert process.sent == []
        world.clock.advance(60)
    assert process.sent == [SIGTERM]
    outcome = GuestAsked.ASKED if asked else GuestAsked.UNREACHABLE
    assert job.guest_asked is outcome


@pytest.mark.parametrize("flags", [POWERDOWN, POWERDOWN | NOWAIT])
def test_a_press_of_somebody_else_is_watched(flags: Flag) -> None:
    """An earlier ExecStop= line may have pressed the button."""
    world, process = asked_world(replace(UP, press_pending=True)), FakeProcess()
    job = world.stop(process, flags)
    world.clock.advance(1)
    assert world.monitors.orders == [GuestOrder.WATCH]
    assert (job.rungs, job.guest_asked) == ((), GuestAsked.ASKED)
    if NOWAIT in flags:
        assert job.result is Result.SIGNALLED
        return
    world.monitors.shows = lambda now: UP
    world.clock.advance(10)
    past = decode(job.snapshot().to_json())
    assert past.asking is not None and len(past.asking.asked) == 1
    world.clock.advance(60)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)


@pytest.mark.parametrize(
    ("later_s", "orders"), [(3, [GuestOrder.BUTTON]), (12, [GuestOrder.BUTTON] * 2)]
)
def test_a_press_of_an_earlier_job_is_not_repeated_at_once(
    later_s: float, orders: list[GuestOrder]
) -> None:
    """The guest has handled the press, so its register no longer shows it."""
    world, process = asked_world(UP), FakeProcess()
    world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(0.1)
    pressed = world.clock.now()
    world.clock.advance(later_s)
    process = FakeProcess()
    job = world.stop(process, POWERDOWN)
    assert job.guest_asked is (GuestAsked.ASKED if later_s < 10 else GuestAsked.NOT_ASKED)
    world.clock.advance(30)
    assert (world.monitors.orders, process.sent, job.rungs == ()) == (orders, [], len(orders) == 1)
    world.clock.advance(35)
    if later_s < 10:
        assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)
        assert pressed + 59 * S <= job.rungs[-1].at <= pressed + 62 * S


def test_a_shutdown_that_an_earlier_job_began_is_watched() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    closing = replace(UP, signs=frozenset({ShutdownSign.AGENT_CLOSED}))
    world.monitors.shows = lambda now: replace(closing, requests=now)
    world.clock.advance(20)
    job.cancel()
    world.clock.advance(30)
    process = FakeProcess()
    job = world.stop(process, POWERDOWN | FORCE)
    world.clock.advance(200)
    assert (world.monitors.orders, process.sent) == ([GuestOrder.BUTTON], [])
    assert job.verdict is Verdict.GUEST_SHUTDOWN
    world.monitors.rest = frozenset({ShutdownSign.POWERED_OFF}), True
    process.die()
    assert (job.result, job.guest_asked) == (Result.EXITED, GuestAsked.SHUT_DOWN)


def test_a_job_without_powerdown_does_not_ask_after_one_that_has() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(1)
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    assert (process.sent, job.guest_asked) == ([SIGTERM], GuestAsked.NOT_ASKED)


def test_a_monitor_that_is_lost_is_opened_again() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(3)
    world.monitors.shows = lambda now: None
    world.clock.advance(5)
    world.monitors.shows = lambda now: UP
    world.clock.advance(3)
    assert (job.phase, world.monitors.open_monitors) == (Phase.POWERDOWN, 1)
    assert world.monitors.orders == [GuestOrder.BUTTON]


def test_the_copy_of_a_lost_connection_is_dropped_first() -> None:
    """While the copy exists, QEMU serves the lost connection, and no new one."""
    world, process = asked_world(UP), FakeProcess()
    kept: list[str] = []
    store = FakeStore()
    store.store_monitor = lambda number, fd: kept.append("keep")  # type: ignore[method-assign]
    store.drop_monitor = lambda number: kept.append("drop")  # type: ignore[method-assign]
    world.registry.saver = JobSaver(store, world.clock)
    world.stop(process, POWERDOWN)
    world.clock.advance(3)
    assert kept == ["keep"]
    world.monitors.shows = lambda now: None
    world.clock.advance(3)
    assert kept == ["keep", "drop"]
    world.monitors.shows = lambda now: UP
    world.clock.advance(3)
    assert kept == ["keep", "drop", "keep"]


def test_a_monitor_that_no_later_daemon_can_reach_ends_with_powerdown_sec() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(10)
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(20)
    again = FakeProcess()
    resumed = after.registry.resume(again, past)
    after.clock.advance(90)
    assert (again.sent, resumed.guest_asked) == ([SIGTERM], GuestAsked.IGNORED)


def test_a_guest_that_was_shutting_down_has_its_time_from_the_next_daemon() -> None:
    world, process = asked_world(UP), FakeProcess()
    job = world.stop(process, POWERDOWN)
    world.clock.advance(1)
    closing = replace(UP, signs=frozenset({ShutdownSign.AGENT_CLOSED}))
    world.monitors.shows = lambda now: replace(closing, requests=now)
    world.clock.advance(49)
    past = decode(job.snapshot().to_json())
    after = World()
    after.clock.advance(55)
    after.monitors.shows = lambda now: UP
    again = FakeProcess()
    resumed = after.registry.resume(again, past)
    after.clock.advance(50)
    assert (resumed.phase, again.sent) == (Phase.POWERDOWN, [])
    after.clock.advance(15)
    assert again.sent == [SIGTERM]


def copying(done: int) -> BlockState:
    jobs = (BackgroundJob(f"backup d ({done} of 99 bytes)", "running", done),)
    return BlockState(at=0, runstate="running", disks=(), jobs=jobs)


def test_a_backup_is_waited_for_before_the_guest_is_asked() -> None:
    """When the guest powers off, QEMU exits, which would cancel the backup."""
    world, process = asked_world(UP), FakeProcess()
    end = world.clock.now() + 100 * S
    quiet = BlockState(at=0, runstate="running", disks=())
    world.monitors.disks = lambda now: copying(now) if now < end else quiet
    job = world.stop(process, POWERDOWN | FORCE)
    world.clock.advance(99)
    assert (world.monitors.orders, process.sent) == ([], [])
    assert (job.phase, job.verdict) == (Phase.POWERDOWN, Verdict.FLUSHING)
    assert [turn.verdict for turn in job.history] == [Verdict.FLUSHING]
    world.clock.advance(3)
    assert world.monitors.orders == [GuestOrder.BUTTON]


def test_a_backup_that_stands_still_is_not_waited_for_longer() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.disks = lambda now: copying(5)
    world.stop(process, POWERDOWN | FORCE)
    world.clock.advance(59)
    assert world.monitors.orders == []
    world.clock.advance(3)
    assert world.monitors.orders == [GuestOrder.BUTTON]


def test_one_press_alone_waits_for_no_backup() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.disks = copying
    world.stop(process, POWERDOWN | NOWAIT)
    world.clock.advance(0.1)
    assert world.monitors.orders == [GuestOrder.BUTTON]


def test_max_sec_ends_the_wait_for_a_backup_before_asking() -> None:
    world, process = asked_world(UP), FakeProcess()
    world.monitors.disks = copying
    world.stop(process, POWERDOWN | FORCE, spans={"max": 20 * S})
    world.clock.advance(11)
    assert (world.monitors.orders, process.sent) == ([], [SIGTERM])
