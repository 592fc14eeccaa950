"""Joining, finding and forgetting jobs."""

from __future__ import annotations

from collections.abc import Callable
from signal import SIGKILL, SIGTERM

import pytest

from qkilld.engine import registry as registry_module
from qkilld.engine.ports import ObservedJob
from qkilld.model.constants import Flag, Result
from qkilld.model.errors import Busy, NoSuchJob
from qkilld.model.event import MessageId
from qkilld.model.policy import Config, Policy

from .conftest import FakeProcess, FakeTimer, S, World, make_guest

FORCE, NOWAIT, FIXED = Flag.FORCE, Flag.NOWAIT, Flag.FIXED


def test_a_second_request_joins_and_may_add_force(world: World) -> None:
    first, second = FakeProcess(), FakeProcess()
    job = world.stop(first)
    world.clock.advance(4)
    assert world.stop(second, FORCE) is job
    assert second.closed
    assert second.sent == []
    assert job.flags == FORCE
    world.clock.advance(6)
    assert first.sent == [SIGTERM, SIGKILL]


def test_force_added_after_the_grace_kills_at_once(world: World) -> None:
    process = FakeProcess()
    world.stop(process)
    world.clock.advance(12)
    world.stop(FakeProcess(), FORCE)
    assert process.sent == [SIGTERM, SIGKILL]


def test_joining_never_takes_force_away(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.stop(FakeProcess())
    assert job.flags == FORCE
    world.clock.advance(10)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize(("asked", "kill_at"), [(20, 20), (3, 10)])
def test_joining_can_only_lengthen_the_grace(world: World, asked: int, kill_at: int) -> None:
    process = FakeProcess()
    world.stop(process, FORCE)
    world.stop(FakeProcess(), FORCE, spans={"grace": asked * S})
    world.clock.advance(kill_at - 0.001)
    assert process.sent == [SIGTERM]
    world.clock.advance(0.001)
    assert process.sent == [SIGTERM, SIGKILL]


def test_force_and_nowait_on_a_running_job_is_sigkill_now(world: World) -> None:
    process = FakeProcess(dies_of=())
    job = world.stop(process)
    world.stop(FakeProcess(), FORCE | NOWAIT)
    assert process.sent == [SIGTERM, SIGKILL]
    assert job.running
    world.stop(FakeProcess(), FORCE | NOWAIT)
    assert process.sent == [SIGTERM, SIGKILL]
    process.die()
    assert job.result is Result.KILLED


def test_nowait_on_a_running_job_changes_nothing(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process)
    assert world.stop(FakeProcess(), NOWAIT) is job
    assert process.sent == [SIGTERM]
    assert job.running


def test_a_recycled_pid_is_another_job(world: World) -> None:
    first = FakeProcess(make_guest(start_time=99))
    second = FakeProcess(make_guest(start_time=100))
    assert world.stop(first) is not world.stop(second)
    assert first.sent == second.sent == [SIGTERM]


def test_a_second_job_after_the_first_has_ended(world: World) -> None:
    job = world.stop(FakeProcess(), NOWAIT)
    again = world.stop(FakeProcess(), NOWAIT)
    assert (job.number, again.number) == (1, 2)


def test_a_new_job_takes_a_survivor_over(world: World) -> None:
    first, second = FakeProcess(), FakeProcess()
    world.stop(first)
    world.clock.advance(15)
    assert not first.closed
    world.stop(second, FORCE)
    assert first.closed
    second.die()
    assert MessageId.SURVIVOR_GONE not in world.journal.ids


def test_jobs_do_not_delay_one_another(world: World) -> None:
    processes = [FakeProcess(make_guest(pid=1000 + i)) for i in range(50)]
    for process in processes:
        world.stop(process, FORCE)
        world.clock.advance(0.01)
    world.clock.advance(10 - 0.01 * 25)
    assert [SIGKILL in p.sent for p in processes] == [True] * 26 + [False] * 24


def test_a_finished_job_is_found_for_a_minute(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process)
    process.die()
    world.clock.advance(59.9)
    assert world.registry.get(1) is job
    assert world.registry.by_pid(4711) is job
    world.clock.advance(0.2)
    with pytest.raises(NoSuchJob):
        world.registry.get(1)
    with pytest.raises(NoSuchJob):
        world.registry.by_pid(4711)
    assert world.clock.pending == 0


def test_by_pid_prefers_the_running_job(world: World) -> None:
    old = FakeProcess(make_guest(start_time=1))
    world.stop(old)
    old.die()
    running = world.stop(FakeProcess(make_guest(start_time=2)))
    ended = FakeProcess(make_guest(start_time=3))
    world.stop(ended)
    ended.die()
    assert world.registry.by_pid(4711) is running


def test_a_user_has_a_limit_and_root_has_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "MAX_JOBS_PER_UID", 3)
    for pid in range(3):
        world.stop(FakeProcess(make_guest(pid=pid)), NOWAIT, uid=1000)
    refused = FakeProcess()
    with pytest.raises(Busy, match="3 jobs"):
        world.stop(refused, NOWAIT, uid=1000)
    assert refused.closed
    assert refused.sent == []
    world.stop(FakeProcess(), NOWAIT, uid=1001)
    for pid in range(10):
        world.stop(FakeProcess(make_guest(pid=pid)), NOWAIT, uid=0)
    world.clock.advance(61)
    world.stop(FakeProcess(), NOWAIT, uid=1000)


def test_a_survivor_counts_for_its_user_until_its_guest_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pidfd and the file of the survivor are kept until the guest is gone, too."""
    monkeypatch.setattr(registry_module, "MAX_JOBS_PER_UID", 2)
    guests = [FakeProcess(make_guest(pid=pid)) for pid in range(2)]
    for process in guests:
        world.stop(process, FIXED, uid=1000)
    world.clock.advance(80)
    with pytest.raises(Busy, match="2 jobs"):
        world.stop(FakeProcess(make_guest(pid=9)), uid=1000)
    # A new job for the same guest replaces the survivor.
    again = FakeProcess(make_guest(pid=0))
    world.stop(again, FIXED, uid=1000)
    again.die()
    world.clock.advance(80)
    job = world.stop(FakeProcess(make_guest(pid=9)), FIXED, uid=1000)
    guests[1].die()
    world.clock.advance(80)
    assert job.result is Result.SURVIVED
    world.stop(FakeProcess(make_guest(pid=10)), uid=1000)
    with pytest.raises(Busy, match="2 jobs"):
        world.stop(FakeProcess(make_guest(pid=11)), uid=1000)


def test_users_together_have_a_limit_and_root_has_a_reserve(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "MAX_JOBS_OF_USERS", 3)
    for pid in range(2):
        world.stop(FakeProcess(make_guest(pid=pid)), NOWAIT, uid=0)
    for pid in range(2, 5):
        world.stop(FakeProcess(make_guest(pid=pid)), NOWAIT, uid=1000 + pid)
    refused = FakeProcess(make_guest(pid=6))
    with pytest.raises(Busy, match="root have 3 jobs"):
        world.stop(refused, NOWAIT, uid=2000)
    assert refused.closed
    assert refused.sent == []
    world.stop(FakeProcess(make_guest(pid=7)), NOWAIT, uid=0)
    world.clock.advance(61)
    world.stop(FakeProcess(make_guest(pid=8)), NOWAIT, uid=2000)


def test_a_guests_own_policy() -> None:
    world = World(Config(guests={"web": Policy(grace=30 * S)}))
    web, other = FakeProcess(make_guest()), FakeProcess(make_guest(pid=2, name="other"))
    world.stop(web, FORCE)
    world.stop(other, FORCE)
    world.clock.advance(10)
    assert (web.sent, other.sent) == ([SIGTERM], [SIGTERM, SIGKILL])
    world.clock.advance(20)
    assert web.sent == [SIGTERM, SIGKILL]


def test_fixed_stands_over_the_configuration() -> None:
    world = World(Config(Policy(grace=30 * S, reap=30 * S)))
    process = FakeProcess(dies_of=())
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(15)
    assert job.result is Result.SURVIVED
    assert process.sent == [SIGTERM, SIGKILL]


def test_a_broken_observer_does_not_touch_the_ladder(world: World) -> None:
    class BrokenObserver:
        def job_new(self, job: ObservedJob) -> None:
            raise RuntimeError("the bus is gone")

        job_changed = job_ended = job_forgotten = job_new

    world.registry.observer = BrokenObserver()
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(10)
    process.wake()
    assert job.result is Result.KILLED
    assert MessageId.INTERNAL_ERROR in world.journal.ids


def test_it_tells_when_it_is_busy(world: World) -> None:
    told: list[bool] = []
    world.registry.on_busy = told.append
    first, second = FakeProcess(make_guest(pid=1)), FakeProcess(make_guest(pid=2))
    world.stop(first)
    world.stop(second)
    first.die()
    assert told == [True]
    second.die()
    assert told == [True, False]


def test_cancel_all(world: World) -> None:
    jobs = [world.stop(FakeProcess(make_guest(pid=pid)), FORCE) for pid in range(3)]
    world.registry.cancel_all("qkilld was stopped")
    assert [job.result for job in jobs] == [Result.CANCELLED] * 3
    assert {job.error for job in jobs} == {"qkilld was stopped"}


def test_the_timers_of_a_job_are_its_requesters(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So root's stop of a guest does not wait behind thousands of jobs of the guest's owner."""
    users: list[int | None] = []
    call_at = world.clock.call_at

    def note(when: int, callback: Callable[[], None], user: int | None = None) -> FakeTimer:
        users.append(user)
        return call_at(when, callback, user)

    monkeypatch.setattr(world.clock, "call_at", note)
    job = world.stop(FakeProcess(make_guest(uid=1000)), uid=0)
    users.clear()
    world.clock.advance(1)  # Several samples are taken, and each has a timeout.
    assert len(users) > 2
    assert set(users) == {0}
    users.clear()
    job.cancel()
    assert users == [0]
