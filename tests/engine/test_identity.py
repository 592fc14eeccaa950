"""Before each signal: the process must still be the QEMU of the same user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest

from qkilld.engine.job import Job
from qkilld.engine.job_saver import JobSaver
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import INFINITY, Flag, Phase, Result
from qkilld.model.errors import Failed, ProcessChanged, UnknownIdentity
from qkilld.model.event import MessageId
from qkilld.model.guest import Guest
from qkilld.model.job import Request

from .conftest import FakeProcess, S, World, make_guest
from .test_kill_written_down import SlowStore, after_crash
from .test_snapshot import crash, passed_on

FORCE, NOWAIT, FIXED = Flag.FORCE, Flag.NOWAIT, Flag.FIXED

ROOT = Steerer(0, Rank.ROOT)
CHANGES: list[dict[str, Any]] = [
    {"executable": "/usr/bin/passwd", "command": "passwd"},
    {"uid": 0},
    {"start_time": 100},
]


def becomes(process: FakeProcess, **change: Any) -> None:
    process.guest = Guest(replace(process.guest.identity, **change), process.guest.label)


def check_failed(job: Job, process: FakeProcess) -> None:
    assert (job.result, job.error_name) == (Result.FAILED, ProcessChanged.bus_name)
    assert process.sent == [SIGTERM]
    assert process.closed


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_no_sigkill_for_what_the_process_has_become(
    world: World, flags: Flag, change: dict[str, Any]
) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    becomes(process, **change)
    world.clock.advance(3600)
    check_failed(job, process)
    (event,) = [e for e in world.journal.events if e.id is MessageId.PROCESS_CHANGED]
    assert event.fields["QKILLD_EXECUTABLE"] == process.guest.identity.executable
    assert event.fields["QKILLD_UID"] == str(process.guest.identity.uid)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "act",
    [
        lambda job: job.force(ROOT),
        lambda job: job.join(Request(FORCE)),
        lambda job: job.join(Request(FORCE | NOWAIT)),
    ],
)
def test_no_sigkill_on_request_for_another_program(
    world: World, act: Callable[[Job], None], change: dict[str, Any]
) -> None:
    process = FakeProcess()
    job = world.stop(process)
    becomes(process, **change)
    with pytest.raises(ProcessChanged, match=r"4711 .*: it gets no signal"):
        act(job)
    check_failed(job, process)


@pytest.mark.parametrize("change", CHANGES)
def test_nor_after_a_restart(world: World, change: dict[str, Any]) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    becomes(process, **change)
    _, resumed = crash(world, job, process)
    check_failed(resumed, process)
    assert resumed.snapshot().error_name == ProcessChanged.bus_name


def test_a_qemu_that_executes_another_qemu_stays_a_target(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    becomes(process, executable="/usr/bin/qemu-system-aarch64", executable_deleted=True)
    world.clock.advance(10)
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert job.result is Result.KILLED


def test_unknown_is_not_another_one(world: World) -> None:
    """The job reads the identity again until it is readable, and then continues."""
    process = FakeProcess()
    job = world.stop(process, FORCE)
    known = process.guest.identity.executable
    becomes(process, executable="")
    with pytest.raises(UnknownIdentity, match="Cannot read the executable"):
        job.force(ROOT)
    with pytest.raises(UnknownIdentity, match="Cannot read the executable"):
        job.join(Request(FORCE | NOWAIT))
    job.join(Request(FORCE))
    assert issubclass(UnknownIdentity, Failed)
    world.clock.advance(3600)
    assert job.running
    assert process.sent == [SIGTERM]
    becomes(process, executable=known)
    world.clock.advance(3)
    assert process.sent == [SIGTERM, SIGKILL]


def test_an_unreadable_identity_is_unknown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens, for example, if no descriptor is free."""
    process = FakeProcess()
    job = world.stop(process, FORCE | FIXED)

    def fail() -> None:
        raise Failed("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(process, "identify", fail)
        world.clock.advance(60)
        assert (job.running, process.sent) == (True, [SIGTERM])
    world.clock.advance(3)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("flags", [FORCE, Flag(0), FORCE | FIXED])
@pytest.mark.parametrize("restart", [False, True])
def test_maxsec_ends_a_job_whose_process_stays_unknown(
    world: World, flags: Flag, restart: bool
) -> None:
    """FIXED without FORCE is left out: such a job has already sent SIGTERM, and ends as usual."""
    by_evidence = FIXED not in flags
    if by_evidence:
        job, process = before_sigterm(world, flags, spans={"max": 60 * S})
    else:
        process = FakeProcess()
        job = world.stop(process, flags, spans={"max": 60 * S})
        becomes(process, executable="")
    sent = list(process.sent)
    world.clock.advance(30)
    if restart:
        world, job = crash(world, job, process)
    world.clock.advance((job.started - world.clock.now()) / S + 64.9)
    assert job.running
    world.clock.advance(1.1)
    assert (job.result, process.sent) == (Result.SURVIVED, sent)
    waiting = "SIGTERM" if by_evidence else "SIGKILL"
    assert job.error.startswith(f"{waiting} could not be sent before MaxSec= had passed: Cannot")
    assert job.error in world.journal.events[-1].message


def test_a_moment_in_which_the_process_is_unknown_ends_no_job_after_maxsec(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE, spans={"max": 60 * S})
    job.hold(ROOT)
    world.clock.advance(3600)
    becomes(process, executable="")
    job.release(ROOT)
    world.clock.advance(3)
    assert job.running
    becomes(process, executable=make_guest().identity.executable)
    world.clock.advance(2)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize(
    ("flags", "signal"), [(FORCE, SIGTERM), (FORCE, SIGKILL), (FORCE | FIXED, SIGKILL)]
)
def test_a_hold_is_no_time_in_which_a_signal_was_tried(
    world: World, flags: Flag, signal: Signals
) -> None:
    if signal is SIGTERM:
        job, process = before_sigterm(world, flags, spans={"max": 60 * S})
    else:
        process = FakeProcess()
        job = world.stop(process, flags, spans={"max": 60 * S})
        becomes(process, executable="")
        world.clock.advance(12)
    sent = list(process.sent)
    job.hold(ROOT)
    world.clock.advance(3600)
    job.release(ROOT)
    world.clock.advance(3)
    assert (job.running, process.sent) == (True, sent)
    world.clock.advance(4)
    assert (job.result, process.sent) == (Result.SURVIVED, sent)


def test_an_extension_counts_for_a_process_that_stays_unknown(world: World) -> None:
    job, process = before_sigterm(world, FORCE, spans={"max": 60 * S})
    job.extend(600 * S, ROOT)
    world.clock.advance(603)
    assert (job.running, process.sent) == (True, [])
    world.clock.advance(4)
    assert job.result is Result.SURVIVED


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_a_process_that_is_exiting_is_given_up_as_after_a_sigkill(
    world: World, flags: Flag
) -> None:
    process = FakeProcess()
    job = world.stop(process, flags)
    becomes(process, executable="", exiting=True)
    world.clock.advance(14)
    assert job.running
    world.clock.advance(4)
    assert job.result is Result.SURVIVED
    assert process.sent == [SIGTERM]
    process.die()
    assert world.journal.ids[-1] is MessageId.SURVIVOR_GONE


def before_sigterm(world: World, flags: Flag, **request: Any) -> tuple[Job, FakeProcess]:
    """Return a job that has flushed, but cannot send SIGTERM until the identity is readable."""
    guest = make_guest()
    process = FakeProcess(replace(guest, label=replace(guest.label, qmp=True)))
    job = world.stop(process, flags, **request)
    becomes(process, executable="")
    world.clock.advance(1)
    assert (job.phase, job.rungs, process.sent) == (Phase.TERMINATE, (), [])
    return job, process


@pytest.mark.parametrize("flags", [FORCE, Flag(0)])
def test_a_restart_before_sigterm_loses_no_job(world: World, flags: Flag) -> None:
    job, process = before_sigterm(world, flags)
    after, resumed = crash(world, job, process, down=30)
    after.clock.advance(1)
    assert (resumed.running, process.sent) == (True, [])
    becomes(process, executable=make_guest().identity.executable)
    after.clock.advance(1)
    assert process.sent == [SIGTERM]
    term_at = resumed.rungs[0].at
    while resumed.running and len(process.sent) < 2 and after.clock.now() < term_at + 60 * S:
        after.clock.advance(0.05)
    assert process.sent == ([SIGTERM, SIGKILL] if flags else [SIGTERM])
    assert resumed.rungs[-1].at - term_at >= 10 * S or not flags


@pytest.mark.parametrize(
    "act", [lambda job: job.force(ROOT), lambda job: job.join(Request(FORCE | NOWAIT))]
)
@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("among_many", [False, True])
def test_restarts_do_not_undo_force(
    world: World, act: Callable[[Job], None], tried: bool, among_many: bool
) -> None:
    """The first daemon has saved its intention to send SIGKILL, and has perhaps tried. The second
    daemon cannot send SIGKILL either, until the identity is readable."""
    store = SlowStore()
    world.registry.saver = JobSaver(store, world.clock)
    guest = make_guest()
    process = FakeProcess(replace(guest, label=replace(guest.label, qmp=True)))
    job = world.stop(process)
    assert job.phase is Phase.QUIT
    act(job)
    becomes(process, executable="")
    if tried:
        store.write()
        world.clock.advance(3)
    store.newest = store._saved
    process._callback = None
    after = after_crash(world, store, process)
    (resumed,) = after.registry
    assert (resumed.running, resumed.rungs, process.sent) == (True, (), [])
    with pytest.raises(Failed, match="as soon as it can"):
        resumed.hold(ROOT)
    last = World()
    last.clock.advance((after.clock.now() - last.clock.now()) / S + 1)
    process._callback = None
    becomes(process, executable=guest.identity.executable)
    saved = passed_on(resumed.snapshot())
    again = last.registry.resume(process, saved, among_many=among_many)
    assert process.sent == [SIGKILL]
    process.wake()
    assert (again.result, [rung.action for rung in again.rungs]) == (Result.KILLED, ["SIGKILL"])


@pytest.mark.parametrize("by", [ROOT, Steerer(1000, Rank.OWNER)])
@pytest.mark.parametrize("restart", [False, True])
def test_a_hold_keeps_back_a_sigterm_that_has_waited(
    world: World, by: Steerer, restart: bool
) -> None:
    job, process = before_sigterm(world, FORCE, uid=by.uid, spans={"max": 60 * S})
    job.hold(by)
    if restart:
        world, job = crash(world, job, process)
    becomes(process, executable=make_guest().identity.executable)
    world.clock.advance(58 if by.rank is Rank.OWNER else 3600)
    assert (job.control.held, process.sent) == (True, [])
    if by is ROOT:
        assert job.deadline == INFINITY
        job.release(by)
    else:
        assert job.deadline == job.started + 60 * S
        world.clock.advance(1)
    assert (job.control.held, process.sent) == (False, [SIGTERM])
