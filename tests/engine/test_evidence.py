"""Jobs based on evidence, with a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGTERM

import pytest

from qkilld.model.constants import Flag, Result, Verdict
from qkilld.model.event import MessageId, Priority
from qkilld.model.policy import Config, Policy
from qkilld.model.sample import Io, Node, Sample, Thread

from .conftest import IDLE, FakeProcess, S, World, make_guest

FORCE, FIXED, NOWAIT = Flag.FORCE, Flag.FIXED, Flag.NOWAIT
SYNC = Thread(7, "worker", "D", 75, True, "folio_wait_bit")
WAITING = replace(IDLE, threads=(SYNC,))


def flushing(now: int) -> Sample:
    """A process that writes a byte every µs."""
    return replace(WAITING, io=Io(0, 0, 0, 0, 0, now, 0))


def test_a_flushing_guest_is_waited_for_however_long_it_takes(world: World) -> None:
    world.sampler.shows = flushing
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(600)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.FLUSHING)
    process.die()
    assert job.result is Result.EXITED
    assert job.assessment is not None
    assert job.assessment.written == pytest.approx(600 * S, abs=2 * S)
    assert [turn.verdict for turn in job.history] == [Verdict.STORAGE_WAIT, Verdict.FLUSHING]


def test_a_stuck_guest_with_nothing_outstanding_goes_after_the_grace(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(9.999)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.IDLE)
    world.clock.advance(0.001)
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert not job.data_at_risk


def test_dead_storage_is_given_up_and_said_so(world: World) -> None:
    world.sampler.shows = lambda now: WAITING
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(59.9)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.STORAGE_WAIT)
    world.clock.advance(0.1)
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert job.data_at_risk
    receipt = world.journal.events[-1]
    assert receipt.priority is Priority.WARNING
    assert receipt.fields["QKILLD_DATA_AT_RISK"] == "1"
    assert "data is at risk" in receipt.message


def test_an_exit_without_the_server_of_a_disk_is_no_proof(world: World) -> None:
    world.sampler.shows = lambda now: replace(IDLE, nodes=(Node("d0", "nbd", served=False),))
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(20)
    process.die()
    assert (job.result, job.data_at_risk) == (Result.EXITED, True)
    receipt = world.journal.events[-1]
    assert receipt.priority is Priority.WARNING
    assert receipt.message.endswith("it exited while nbd node d0 had no server.")


def test_a_sigkill_of_somebody_else_puts_at_risk_what_ours_would(world: World) -> None:
    world.sampler.shows = lambda now: WAITING
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(5)
    process.die(SIGKILL)
    assert (job.result, process.sent, job.data_at_risk) == (Result.EXITED, [SIGTERM], True)
    receipt = world.journal.events[-1]
    assert receipt.priority is Priority.WARNING
    assert "it did not exit by itself: SIGKILL ended it" in receipt.message


def test_an_exit_after_an_error_puts_at_risk_what_sigkill_would(world: World) -> None:
    world.sampler.shows = lambda now: WAITING
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(5)
    process.die(1 << 8)
    assert (job.result, process.sent, job.data_at_risk) == (Result.EXITED, [SIGTERM], True)
    assert "it exited with code 1" in world.journal.events[-1].message


def test_storage_that_comes_back_in_time(world: World) -> None:
    back = world.clock.now() + 50 * S
    world.sampler.shows = lambda now: WAITING if now < back else flushing(now)
    process = FakeProcess()
    world.stop(process, FORCE)
    world.clock.advance(300)
    assert process.sent == [SIGTERM]


def test_a_process_without_evidence_is_not_idle(world: World) -> None:
    world.sampler.shows = lambda now: Sample(now, "S")
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(59.9)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.UNKNOWN)
    world.clock.advance(0.2)
    assert process.sent == [SIGTERM, SIGKILL]
    assert job.data_at_risk


def test_a_look_that_never_comes_back_delays_nothing_for_good(world: World) -> None:
    world.sampler.shows = lambda now: None
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(59)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.UNKNOWN)
    world.clock.advance(3)
    assert process.sent == [SIGTERM, SIGKILL]
    # A sample that arrives after the end is ignored.
    process.die()
    for callback in world.sampler.late:
        callback(IDLE)
    assert job.result is Result.KILLED


def test_a_sample_for_which_other_users_leave_no_thread_brings_sigkill_no_nearer(
    world: World,
) -> None:
    world.sampler.shows = lambda now: None
    world.sampler.lacks_thread = True
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(600)
    assert (process.sent, job.verdict) == ([SIGTERM], Verdict.UNKNOWN)
    world.sampler.shows = lambda now: WAITING
    world.clock.advance(58)
    assert process.sent == [SIGTERM]
    world.clock.advance(5)
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()


def test_progress_seen_by_the_last_look_holds_sigkill_back(world: World) -> None:
    """The samples before the deadline show an idle process, and the one at the deadline a write."""
    deadline = world.clock.now() + 10 * S

    def shows(now: int) -> Sample:
        return IDLE if now < deadline else replace(IDLE, io=Io(0, 0, 0, 0, 0, 4096, 0))

    world.sampler.shows = shows
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(10)
    assert process.sent == [SIGTERM]
    assert job.deadline == deadline + 10 * S
    world.clock.advance(10)
    assert process.sent == [SIGTERM, SIGKILL]


def test_a_stopped_guest_is_continued_and_its_time_starts_again(world: World) -> None:
    stopped_until = world.clock.now() + 100_000
    world.sampler.shows = lambda now: replace(IDLE, state="T") if now <= stopped_until else IDLE
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(0.1)
    assert process.sent == [SIGTERM, SIGCONT]
    world.clock.advance(9.95)
    assert process.sent == [SIGTERM, SIGCONT]
    world.clock.advance(0.05)
    assert process.sent == [SIGTERM, SIGCONT, SIGKILL]
    assert [rung.phase.value for rung in job.rungs] == ["terminate", "terminate", "kill"]


def test_a_dead_process_that_its_debugger_does_not_collect_is_gone(world: World) -> None:
    process = FakeProcess(dies_of=(), zombie=True)
    job = world.stop(process, FORCE)
    world.sampler.shows = lambda now: replace(IDLE, state="Z") if SIGKILL in process.sent else IDLE
    world.clock.advance(10.5)
    assert (job.result, job.verdict) == (Result.KILLED, Verdict.ZOMBIE)


def test_sigkill_at_once_without_a_look_puts_data_at_risk(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process)
    world.stop(FakeProcess(), FORCE | NOWAIT)
    assert (process.sent, job.data_at_risk) == ([SIGTERM, SIGKILL], True)


def test_fixed_and_nowait_do_not_look(world: World) -> None:
    world.sampler.shows = flushing
    fixed, nowait = FakeProcess(), FakeProcess()
    world.stop(fixed, FORCE | FIXED)
    world.clock.advance(10)
    assert fixed.sent == [SIGTERM, SIGKILL]
    fixed.wake()
    world.stop(nowait, NOWAIT)
    world.clock.advance(10)
    assert world.sampler.looks == 0


def test_an_idle_guest_that_goes_at_once_costs_no_look(world: World) -> None:
    process = FakeProcess()
    world.stop(process, FORCE)
    world.clock.advance(0.05)
    process.die()
    assert world.sampler.looks == 0


def test_max_caps_even_progress() -> None:
    world = World(Config(Policy(max=30 * S)))
    world.sampler.shows = flushing
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(29.9)
    assert process.sent == [SIGTERM]
    world.clock.advance(0.1)
    assert process.sent == [SIGTERM, SIGKILL]
    assert job.data_at_risk


def test_without_force_it_gives_up_but_never_kills(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process)
    world.clock.advance(15)
    assert job.result is Result.SURVIVED
    assert process.sent == [SIGTERM]
    world.sampler.shows = flushing
    patient = FakeProcess()
    job = world.stop(patient)
    world.clock.advance(300)
    assert job.running


def test_the_end_names_the_wait_of_a_survivor(world: World) -> None:
    stuck = replace(IDLE, threads=(replace(SYNC, wchan="nfs_wait_bit_killable"),))
    world.sampler.shows = lambda now: stuck
    process = FakeProcess(dies_of=())
    job = world.stop(process, FORCE, spans={"storage_stall": 20 * S})
    world.clock.advance(25)
    assert job.result is Result.SURVIVED
    assert "nfs_wait_bit_killable" in world.journal.events[-1].message
    process.die()
    assert world.journal.events[-1].id is MessageId.SURVIVOR_GONE


def test_the_watch_is_closed_with_the_job(world: World) -> None:
    process = FakeProcess()
    world.stop(process, FORCE)
    world.clock.advance(1)
    process.die()
    assert world.sampler.closed == 1
    assert world.clock.pending == 1  # the timer that forgets the job
    world.clock.advance(60)
    assert world.clock.pending == 0


def test_many_jobs_are_looked_at_more_rarely(world: World) -> None:
    world.sampler.shows = flushing
    for pid in range(1000):
        world.stop(FakeProcess(make_guest(pid=pid)), FORCE)
    world.clock.advance(10)
    looks = world.sampler.looks
    world.clock.advance(20)
    assert 9_000 <= world.sampler.looks - looks <= 11_000


def test_the_sample_that_sigkill_waits_for_is_urgent(world: World) -> None:
    """If the sample was not urgent, it could wait behind thousands of other samples."""
    requests: list[tuple[float, bool]] = []
    take = world.sampler.take_sample

    def look(
        callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        requests.append((world.clock.now() / S, urgent))
        take(callback, detail=detail, urgent=urgent)

    world.sampler.take_sample = look  # type: ignore[method-assign]
    job = world.stop(FakeProcess(), FORCE)
    began = job.started / S
    world.clock.advance(12)
    assert job.rungs[-1].action == "SIGKILL"
    urgent = [at - began for at, urgent in requests if urgent and at <= job.rungs[-1].at / S]
    assert urgent == [pytest.approx(10, abs=0.01)]
    assert sum(1 for _, urgent in requests if not urgent) >= 9


@pytest.mark.parametrize("lag", [0.05, 0.21, 0.5, 0.99, 1.1])
def test_samples_that_come_late_hang_no_job(world: World, lag: float) -> None:
    """Samples come late if the processors are busy, or if reading a control group is slow."""

    def look(
        callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        sample = replace(IDLE, at=world.clock.now())
        world.clock.call_at(world.clock.now() + int(lag * S), lambda: callback(sample))

    world.sampler.take_sample = look  # type: ignore[method-assign]
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(75)
    assert process.sent == [SIGTERM, SIGKILL]
    killed = (job.rungs[-1].at - job.started) / S
    # After one second, a sample counts as missing, and the job then assumes that requests are
    # outstanding.
    assert killed == pytest.approx(10 if lag < 1 else 60, abs=1.5)
