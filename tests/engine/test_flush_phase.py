"""The flush before SIGTERM. No guest is left paused, whatever happens at whatever time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.engine.job import Job
from qkilld.engine.snapshot import decode
from qkilld.model.access import Rank, Steerer
from qkilld.model.block_state import (
    BackgroundJob,
    BlockState,
    FlushResult,
    GuestDisk,
    RequestQueue,
)
from qkilld.model.constants import Flag, Phase, Result, Verdict
from qkilld.model.errors import Busy, UnknownIdentity
from qkilld.model.guest import Identity, Label
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import Control
from qkilld.model.sample import Device, ImagePlace, Mount, Thread
from tests.engine.conftest import IDLE, FakeProcess, S, World, make_guest

FORCE = Flag.FORCE
ROOT = Steerer(0, Rank.ROOT)
LOCAL = GuestDisk("#block1", "local", network=False, device="/m/a/virtio-backend")
REMOTE = GuestDisk("#block2", "remote", network=True, device="/m/b/virtio-backend")
QUEUES = tuple(RequestQueue(f"/m/{name}/virtio-backend", 0, 0, 5) for name in "ab")
QUIET = BlockState(at=0, runstate="running", disks=(LOCAL,), queues=QUEUES)


def with_monitor() -> FakeProcess:
    guest = make_guest()
    return FakeProcess(replace(guest, label=replace(guest.label, qmp=True)))


def flushing_world(state: BlockState | str = QUIET) -> World:
    world = World()
    world.monitors.opens = True
    world.monitors.disks = lambda now: state
    world.monitors.flushes = lambda: (FlushResult(LOCAL.node, LOCAL.title),)
    return world


def test_flushed_with_processors_stopped_and_then_sigterm() -> None:
    world, process = flushing_world(), with_monitor()
    job = world.stop(process, FORCE)
    assert (job.phase, process.sent) == (Phase.QUIT, [])
    world.clock.advance(0)
    assert world.monitors.done == ["flush local", "stop", "flush"]
    assert (job.phase, process.sent) == (Phase.TERMINATE, [SIGTERM])
    assert (job.flush.outcome, job.flush.proven) == ("complete", True)
    process.die()
    assert (job.result, job.risks) == (Result.EXITED, ())
    assert [(rung.phase, rung.action) for rung in job.rungs] == [
        ("quit", "flush"),
        ("terminate", "SIGTERM"),
    ]
    assert world.monitors.open_monitors == 0


def test_a_process_without_a_monitor_gets_sigterm_at_once() -> None:
    world, process = flushing_world(), FakeProcess()
    world.stop(process)
    assert (process.sent, world.monitors.done) == ([SIGTERM], [])


@pytest.mark.parametrize("flags", [Flag.FIXED, Flag.NOWAIT, Flag.FORCE | Flag.NOWAIT])
def test_a_fixed_clock_and_single_signals_do_not_wait(flags: Flag) -> None:
    world, process = flushing_world(), with_monitor()
    world.stop(process, flags)
    assert process.sent and world.monitors.done == []


def test_sigkill_does_not_risk_disks_that_are_proven_flushed() -> None:
    world, process = flushing_world(), with_monitor()
    world.sampler.shows = lambda now: None
    job = world.stop(process, FORCE)
    world.clock.advance(100)
    assert process.sent == [SIGTERM, SIGKILL]
    assert not job.data_at_risk


def test_nothing_is_proven_if_an_image_was_open_that_no_disk_uses() -> None:
    world, process = flushing_world(replace(QUIET, unused=("left",))), with_monitor()
    world.sampler.shows = lambda now: None
    job = world.stop(process, FORCE)
    world.clock.advance(100)
    assert (process.sent, job.flush.proven) == ([SIGTERM, SIGKILL], False)
    assert job.data_at_risk


def test_an_error_of_the_flush_is_at_risk() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.flushes = lambda: (FlushResult(LOCAL.node, LOCAL.title, "Input/output error"),)
    job = world.stop(process)
    world.clock.advance(0)
    process.die()
    assert (job.result, [risk.code for risk in job.risks]) == (Result.EXITED, ["flush-failed"])
    assert "Input/output error" in job.flush.reason


def test_a_flush_without_an_answer_keeps_sigterm_back_for_a_second() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.flushes = lambda: None
    job = world.stop(process)
    world.clock.advance(0.99)
    assert process.sent == []
    world.clock.advance(0.02)
    assert (process.sent, job.flush.outcome) == ([SIGTERM], "left-out")
    assert "cont" not in world.monitors.done


def test_a_monitor_that_does_not_open() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.opens = False
    job = world.stop(process)
    world.clock.advance(0)
    assert (process.sent, job.flush.outcome) == ([SIGTERM], "left-out")


def test_disks_that_cannot_be_seen() -> None:
    world, process = flushing_world("it is a human monitor"), with_monitor()
    job = world.stop(process)
    world.clock.advance(0)
    assert (process.sent, job.flush.reason) == ([SIGTERM], "it is a human monitor")


STUCK = replace(QUEUES[1], in_flight=1)
HELD_UP = replace(QUIET, disks=(LOCAL, REMOTE), queues=(QUEUES[0], STUCK))


def test_requests_that_are_a_second_old_keep_the_processors_running() -> None:
    world, process = flushing_world(HELD_UP), with_monitor()
    job = world.stop(process, FORCE)
    world.clock.advance(0.9)
    assert (process.sent, world.monitors.done) == ([], [])
    world.clock.advance(0.2)
    assert world.monitors.done == ["flush local"]
    assert process.sent == [SIGTERM]
    assert (job.flush.outcome, job.flush.proven) == ("partial", False)
    assert "remote have not been answered" in job.flush.reason


def test_requests_that_are_answered_do_not() -> None:
    world, process = flushing_world(), with_monitor()
    busy = replace(STUCK, completed=9)
    world.monitors.disks = lambda now: (
        HELD_UP if now < 1000.5 * S else replace(HELD_UP, queues=(QUEUES[0], busy))
    )
    world.stop(process, FORCE)
    world.clock.advance(1.1)
    assert world.monitors.done == ["flush local", "flush remote", "stop", "flush"]


def test_a_request_that_is_answered_soon_delays_sigterm_by_no_second() -> None:
    world, process = flushing_world(), with_monitor()
    busy = replace(STUCK, completed=9)
    world.monitors.disks = lambda now: (
        HELD_UP if now < 1000.02 * S else replace(HELD_UP, queues=(QUEUES[0], busy))
    )
    world.monitors.flushes = lambda: tuple(
        FlushResult(disk.node, disk.title) for disk in (LOCAL, REMOTE)
    )
    job = world.stop(process, FORCE)
    world.clock.advance(0.06)
    assert world.monitors.done == ["flush local", "flush remote", "stop", "flush"]
    assert (process.sent, job.flush.proven) == ([SIGTERM], True)


def writing(bytes: int) -> dict[str, Any]:
    """Return fields of a sample: a thread is in fdatasync, and the disk has written `bytes` so
    far."""
    thread = Thread(8, "worker", "D", 75, True, "folio_wait_bit", "fdatasync", 3, "disk", ("8:0",))
    disk = Device("8:0", "sda", bytes, bytes // 512, 0, 1)
    return {"threads": (thread,), "devices": (disk,)}


def slow_world() -> World:
    """A world in which the first flush, made while the processors run, is never answered."""
    world = flushing_world()
    world.monitors.answers_flush = False
    return world


def test_a_flush_before_the_stop_gets_time_as_long_as_something_moves() -> None:
    world, process = slow_world(), with_monitor()
    end = world.clock.now() + 30 * S
    # The disk writes for 30 s.
    world.sampler.shows = lambda now: replace(IDLE, **writing(min(now, end)))
    job = world.stop(process, FORCE)
    world.clock.advance(30)
    assert (job.phase, process.sent) == (Phase.QUIT, [])
    assert job.verdict is Verdict.FLUSHING
    world.clock.advance(7)
    assert (process.sent, job.flush.outcome) == ([SIGTERM], "left-out")
    assert "stop" not in world.monitors.done


def test_it_is_given_up_when_nothing_moves() -> None:
    world, process = slow_world(), with_monitor()
    world.stop(process, FORCE)
    world.clock.advance(5.9)
    assert process.sent == []
    world.clock.advance(0.2)
    assert process.sent == [SIGTERM]


def test_it_gets_storage_stall_sec_at_most() -> None:
    world, process = slow_world(), with_monitor()
    world.sampler.shows = lambda now: replace(IDLE, **writing(now))
    world.stop(process, FORCE)
    world.clock.advance(59.9)
    assert process.sent == []
    world.clock.advance(0.2)
    assert process.sent == [SIGTERM]


def test_it_can_be_held_and_cancelled_meanwhile() -> None:
    world, process = slow_world(), with_monitor()
    job = world.stop(process, FORCE)
    world.clock.advance(2)
    job.hold(ROOT)
    job.cancel()
    world.clock.advance(20)
    assert (process.sent, world.monitors.done) == ([], ["flush local"])


NVME = replace(LOCAL, device="/m/nvme")


@pytest.mark.parametrize(
    ("moves", "plan"), [(True, ["flush local", "stop", "flush"]), (False, ["flush local"])]
)
def test_requests_of_other_disks_are_seen_from_outside(moves: bool, plan: list[str]) -> None:
    """QEMU does not report the requests of an NVMe disk, but a thread in fdatasync shows them."""
    world, process = flushing_world(replace(QUIET, disks=(NVME,))), with_monitor()
    world.sampler.shows = lambda now: replace(IDLE, **writing(now if moves else 0))
    job = world.stop(process, FORCE)
    world.clock.advance(0.9)
    assert (process.sent, world.monitors.done) == ([], [])
    world.clock.advance(0.3)
    assert (process.sent, world.monitors.done) == ([SIGTERM], plan)
    assert ("may be stuck" in job.flush.reason) is not moves


def test_such_a_disk_without_requests_is_flushed_at_once() -> None:
    world, process = flushing_world(replace(QUIET, disks=(NVME,))), with_monitor()
    job = world.stop(process, FORCE)
    world.clock.advance(0.1)
    assert (process.sent, job.flush.proven) == ([SIGTERM], True)


def copying(done: int, migration: bool = False) -> BlockState:
    title = f"backup d ({done} of 99 bytes)"
    return replace(QUIET, jobs=(BackgroundJob(title, "running", done, migration),))


@pytest.mark.parametrize("migration", [False, True])
def test_a_backup_is_waited_for_as_long_as_it_moves(migration: bool) -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.disks = lambda now: copying(min(now // S, 1100), migration)
    job = world.stop(process, FORCE)
    world.clock.advance(100)
    assert process.sent == []
    assert job.deadline == world.clock.now() + job.policy.storage_stall
    world.clock.advance(50)
    assert job.deadline == 1160 * S
    world.clock.advance(15)
    assert process.sent == [SIGTERM]
    code = "migration-cancelled" if migration else "job-cancelled"
    assert code in [risk.code for risk in job.risks]
    assert not job.flush.proven


def test_a_backup_that_ends_is_not_at_risk() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.disks = lambda now: copying(now // S) if now < 1030 * S else QUIET
    job = world.stop(process)
    world.clock.advance(32)
    assert (process.sent, job.risks) == ([SIGTERM], ())


def test_max_sec_ends_the_wait_for_a_backup() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.disks = lambda now: copying(now)
    world.stop(process, FORCE, spans={"max": 20 * S})
    world.clock.advance(9)
    assert process.sent == []
    world.clock.advance(2)
    assert process.sent == [SIGTERM]
    world.clock.advance(10)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("after", [0.0, 0.3, 0.6, 0.89])
def test_cancel_sets_the_processors_going_again(after: float) -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.flushes = lambda: None
    job = world.stop(process)
    world.clock.advance(after)
    assert job.processors_stopped
    job.cancel()
    assert (job.result, job.processors_stopped, process.closed) == (Result.CANCELLED, True, False)
    world.clock.advance(0)
    assert world.monitors.done[-1] == "cont"
    assert (process.sent, job.processors_stopped, process.closed) == ([], False, True)
    assert world.monitors.open_monitors == 0


def test_cancel_before_the_stop_sends_nothing() -> None:
    world, process = flushing_world(HELD_UP), with_monitor()
    job = world.stop(process)
    world.clock.advance(0.5)
    job.cancel()
    world.clock.advance(100)
    assert (process.sent, world.monitors.done, world.monitors.open_monitors) == ([], [], 0)


def test_a_guest_that_is_left_alone_is_at_no_risk() -> None:
    unsafe = replace(LOCAL, no_flush=True)
    world, process = flushing_world(replace(QUIET, disks=(unsafe,))), with_monitor()
    world.monitors.flushes = lambda: None
    job = world.stop(process)
    world.clock.advance(0.1)
    assert [risk.code for risk in job.risks] == ["no-flush"]
    job.cancel()
    assert not job.data_at_risk


def test_nobody_can_hold_it_between_stop_and_sigterm() -> None:
    world, process = flushing_world(), with_monitor()
    world.monitors.flushes = lambda: None
    job = world.stop(process)
    world.clock.advance(0.1)
    with pytest.raises(Busy):
        job.hold(ROOT)
    world.clock.advance(1)
    job.hold(ROOT)


def test_a_hold_before_the_stop_keeps_it_back() -> None:
    world, process = flushing_world(), with_monitor()
    job = world.stop(process)
    job.hold(ROOT)
    world.clock.advance(50)
    assert (process.sent, world.monitors.done) == ([], [])
    job.release(ROOT)
    world.clock.advance(1.1)
    assert (process.sent, world.monitors.done) == ([SIGTERM], ["flush local", "stop", "flush"])


def saved_when_stopped(change: Callable[[World, Job], None] = lambda world, job: None) -> object:
    """Return the saved state of the job at the moment when the processors are stopped."""
    world, process = flushing_world(), with_monitor()
    world.monitors.flushes = lambda: None
    job = world.stop(process, FORCE)
    world.clock.advance(0.2)
    change(world, job)
    return job.snapshot().to_json()


def test_the_next_daemon_sets_them_going_and_sends_sigterm() -> None:
    past = decode(saved_when_stopped())
    assert past.processors_stopped
    after, process = flushing_world(), with_monitor()
    after.clock.advance(1)
    job = after.registry.resume(process, past)
    after.clock.advance(0)
    assert after.monitors.done == ["cont"]
    assert process.sent == [SIGTERM]
    assert not job.processors_stopped and not job.flush.proven


def test_the_next_daemon_sends_sigterm_if_it_cannot_open_the_monitor() -> None:
    past = decode(saved_when_stopped())
    after, process = flushing_world(), with_monitor()
    after.clock.advance(1)
    after.monitors.opens = False
    after.registry.resume(process, past)
    after.clock.advance(1.1)
    assert process.sent == [SIGTERM]


def test_the_next_daemon_ends_what_a_cancelled_job_has_begun() -> None:
    past = decode(saved_when_stopped(lambda world, job: job.cancel()))
    assert (past.result, past.processors_stopped) == (Result.CANCELLED, True)
    after, process = flushing_world(), with_monitor()
    after.clock.advance(1)
    after.monitors.opens = False
    job = after.registry.resume(process, past)
    after.clock.advance(3)
    after.monitors.opens = True
    after.clock.advance(1.1)
    assert (after.monitors.done, process.sent) == (["cont"], [])
    assert not job.processors_stopped


class HiddenProcess(FakeProcess):
    hidden = False

    def identify(self) -> Identity:
        if self.hidden:
            raise UnknownIdentity("nothing tells what it runs")
        return super().identify()


def test_a_sigterm_that_cannot_be_sent_leaves_nobody_paused() -> None:
    world = flushing_world()
    guest = make_guest()
    process = HiddenProcess(replace(guest, label=replace(guest.label, qmp=True)))
    job = world.stop(process, FORCE)
    process.hidden = True
    world.clock.advance(0)
    assert (process.sent, world.monitors.done) == ([], ["flush local", "stop", "flush", "cont"])
    assert not job.processors_stopped and not job.flush.proven
    process.hidden = False
    world.clock.advance(1.1)
    assert process.sent == [SIGTERM]


def test_a_guest_without_disks_is_not_stopped() -> None:
    world, process = flushing_world(replace(QUIET, disks=())), with_monitor()
    job = world.stop(process)
    world.clock.advance(0)
    assert (process.sent, world.monitors.done, job.flush.proven) == ([SIGTERM], [], True)
    assert [rung.action for rung in job.rungs] == ["SIGTERM"]


def test_a_paused_guest_is_flushed_and_stays_paused() -> None:
    world, process = flushing_world(replace(QUIET, runstate="paused")), with_monitor()
    job = world.stop(process)
    assert not job.processors_stopped
    world.clock.advance(0)
    assert (world.monitors.done, process.sent) == (["flush"], [SIGTERM])


def test_a_guest_that_has_powered_off_is_flushed_before_quit() -> None:
    world, process = flushing_world(replace(QUIET, runstate="shutdown")), with_monitor()
    job = world.stop(process)
    world.clock.advance(0)
    assert (world.monitors.done, world.monitors.orders) == (["flush"], [GuestOrder.QUIT])
    assert (job.phase, process.sent) == (Phase.QUIT, [])
    world.clock.advance(2.1)
    assert process.sent == [SIGTERM]


def test_the_state_is_written_down_before_the_stop() -> None:
    world, process = flushing_world(), with_monitor()
    saved: list[Callable[[], None]] = []
    world.registry._collaborators = replace(world.registry._collaborators, when_saved=saved.append)
    job = world.stop(process)
    world.clock.advance(0.1)
    assert job.snapshot().processors_stopped and world.monitors.done == ["flush local"]
    saved.pop()()
    assert world.monitors.done == ["flush local", "stop", "flush"]


def test_a_state_that_is_not_written_in_time_leaves_the_processors_running() -> None:
    world, process = flushing_world(), with_monitor()
    world.registry._collaborators = replace(
        world.registry._collaborators, when_saved=lambda callback: None
    )
    world.stop(process)
    world.clock.advance(0.6)
    assert (process.sent, world.monitors.done) == ([SIGTERM], ["flush local"])


def test_the_fallback_does_not_take_it_for_a_job_that_has_sent_sigterm() -> None:
    from qkilld.engine.snapshot import Snapshot
    from qkilld.model.constants import GuestAsked
    from qkilld.model.job import Request
    from qkilld.model.policy import Policy

    world, process = flushing_world(replace(QUIET, runstate="paused")), with_monitor()
    past = Snapshot.of_signals(
        process.guest,
        Request(FORCE),
        Policy(),
        number=7,
        started=world.clock.now(),
        guest_asked=GuestAsked.NOT_ASKED,
        control=Control(),
    )
    assert (past.phase, past.rungs) == (Phase.QUIT, ())
    world.registry.resume(process, past)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]


def test_label_of_a_guest_survives() -> None:
    assert (
        decode(saved_when_stopped()).guest.label == replace(make_guest().label, qmp=True) != Label()
    )


FUSE = Mount("fuse.lab", None, None, "0:53")
PLACES = (ImagePlace(("remote",), "0:53"), ImagePlace(("local",), ""))


def world_with_fuse() -> World:
    """A guest with a disk on FUSE and a local disk."""
    names = replace(LOCAL, names=("local",)), replace(LOCAL, title="remote", names=("remote",))
    world = flushing_world(replace(QUIET, disks=names))
    shown = replace(IDLE, mounts=(FUSE,), images=PLACES)
    world.sampler.shows = lambda now: shown
    return world


def test_before_a_file_system_is_asked_the_local_disk_is_flushed() -> None:
    world, process = world_with_fuse(), with_monitor()
    job = world.stop(process)
    world.clock.advance(0)
    assert world.monitors.done == [
        *("look", "flush local", "look at files"),
        *("flush local", "flush remote", "stop", "flush"),
    ]
    assert (process.sent, job.flush.outcome) == ([SIGTERM], "complete")
    assert [rung.action for rung in job.rungs] == ["flush", "SIGTERM"]


def test_a_file_system_that_does_not_answer_hides_no_flush() -> None:
    world, process = world_with_fuse(), with_monitor()
    world.monitors.files_answer = False
    job = world.stop(process)
    world.clock.advance(4)
    assert world.monitors.done == ["look", "flush local", "look at files"]
    assert (process.sent, job.flush.outcome, job.flush.proven) == ([SIGTERM], "partial", False)
    assert job.flush.reason.endswith("did not answer in time; flushed but for remote")
    assert [rung.action for rung in job.rungs] == ["flush", "SIGTERM"]


def test_a_call_that_stands_keeps_it_from_being_asked() -> None:
    world, process = world_with_fuse(), with_monitor()
    held = Thread(7, "w", "D", 18, True, "fuse", "pwrite64", 9, "mount", (), "0:53")
    shown = replace(IDLE, mounts=(FUSE,), images=PLACES, threads=(held,))
    world.sampler.shows = lambda now: shown
    job = world.stop(process)
    world.clock.advance(2)
    assert world.monitors.done == ["look", "look", "flush local"]
    assert (process.sent, job.flush.outcome) == ([SIGTERM], "partial")
    assert "a request may be stuck" in job.flush.reason


def test_a_held_job_asks_no_file_system() -> None:
    world, process = world_with_fuse(), with_monitor()
    world.monitors.files_answer = False
    job = world.stop(process)
    job.hold(ROOT)
    world.clock.advance(10)
    assert process.sent == [] and set(world.monitors.done) == {"look"}
    job.release(ROOT)
    world.clock.advance(6)
    assert "flush local" in world.monitors.done and process.sent == [SIGTERM]


def test_without_such_a_file_system_nothing_is_looked_at_twice() -> None:
    world, process = flushing_world(), with_monitor()
    world.stop(process)
    world.clock.advance(0)
    assert world.monitors.done == ["flush local", "stop", "flush"]
    assert world.sampler.looks <= 2
