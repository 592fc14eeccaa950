"""SIGKILL is written down before it is sent, so that no later daemon takes it for an exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGKILL, SIGTERM

import pytest

from qkilld.engine.job import Job
from qkilld.engine.job_saver import JobSaver
from qkilld.engine.ports import JobState, Process
from qkilld.engine.snapshot import Snapshot
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag, Phase, Result
from qkilld.model.errors import Failed
from qkilld.model.job import Request

from .conftest import IDLE, FakeProcess, S, World
from .test_powerdown import UP
from .test_snapshot import passed_on

FORCE, NOWAIT, FIXED = Flag.FORCE, Flag.NOWAIT, Flag.FIXED
ROOT = Steerer(0, Rank.AUTHORIZED)


class SlowStore:
    """A store that writes only when `write` is called."""

    def __init__(self) -> None:
        self.newest: Snapshot | None = None
        self._saved: Snapshot | None = None
        self._waiting: list[Callable[[], None]] = []

    def write(self) -> None:
        self.newest = self._saved
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def store_fd(self, number: int, process: Process) -> None: ...

    def save(self, state: JobState) -> None:
        assert isinstance(state, Snapshot)
        self._saved = state

    def when_written(self, callback: Callable[[], None]) -> None:
        self._waiting.append(callback)

    def write_first(self, number: int, callback: Callable[[], None]) -> None:
        self._waiting.append(callback)

    def store_monitor(self, number: int, fd: int) -> None: ...

    def drop_fd(self, number: int) -> None: ...

    def drop_monitor(self, number: int) -> None: ...

    def forget(self, number: int) -> None: ...


@pytest.fixture
def store(world: World) -> SlowStore:
    store = SlowStore()
    world.registry.saver = JobSaver(store, world.clock)
    return store


def after_crash(world: World, store: SlowStore, process: FakeProcess | None) -> World:
    """Return the world of the next daemon, which continues from the last state that was written."""
    assert store.newest is not None
    after = World()
    after.clock.advance((world.clock.now() - after.clock.now()) / S + 0.1)
    after.registry.resume(process, passed_on(store.newest))
    return after


def test_it_is_written_before_it_is_sent(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(10)
    assert (process.sent, job.phase) == ([SIGTERM], Phase.KILL)
    store.write()
    assert process.sent == [SIGTERM, SIGKILL]
    assert store.newest is not None
    assert [rung.action for rung in store.newest.rungs] == ["SIGTERM", "SIGKILL"]


def test_a_guest_that_went_with_the_daemon_was_killed(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    while job.phase is not Phase.KILL:
        world.clock.advance(0.01)
    store.write()
    assert process.dead
    (resumed,) = after_crash(world, store, None).registry
    assert resumed.result is Result.KILLED
    assert resumed.risks == job.risks


def test_a_saved_but_unsent_sigkill_is_not_taken_for_sent(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    world.stop(process, FORCE | FIXED)
    world.clock.advance(10)
    store.newest = store._saved
    assert process.sent == [SIGTERM]
    process._callback = None
    after = after_crash(world, store, process)
    (job,) = after.registry
    assert process.sent == [SIGTERM, SIGKILL]
    assert [rung.action for rung in job.rungs] == ["SIGTERM", "SIGKILL"]


def test_a_full_disk_does_not_keep_it_back(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    world.stop(process, FORCE | FIXED)
    world.clock.advance(10.06)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("written", [False, True])
def test_time_that_is_given_meanwhile_counts(world: World, store: SlowStore, written: bool) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(10)
    job.extend(20 * S, ROOT)
    assert job.phase is Phase.TERMINATE
    if written:
        store.write()
    world.clock.advance(5)
    assert process.sent == [SIGTERM]
    assert not job.snapshot().risks
    world.clock.advance(16)
    store.write()
    assert (job.result, process.sent) == (Result.KILLED, [SIGTERM, SIGKILL])


def test_an_exit_meanwhile_is_an_exit(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(10)
    process.die()
    store.write()
    assert (job.result, job.data_at_risk) == (Result.EXITED, False)
    assert [rung.action for rung in job.rungs] == ["SIGTERM"]
    assert store.newest is not None and store.newest.result is Result.EXITED


def test_progress_meanwhile_counts(world: World, store: SlowStore) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(9.9)
    world.sampler.shows = lambda now: replace(IDLE, cpu=now, switches=now, io=IDLE.io)
    while job.phase is not Phase.KILL:
        world.clock.advance(0.01)
    job.extend(5 * S, ROOT)
    store.write()
    assert process.sent == [SIGTERM]


def test_force_waits_until_sigkill_is_saved(world: World, store: SlowStore) -> None:
    process, other = FakeProcess(), FakeProcess()
    job = world.stop(process)
    job.force(ROOT)
    assert process.sent == [SIGTERM]
    store.write()
    assert process.sent == [SIGTERM, SIGKILL]
    process.wake()
    assert job.result is Result.KILLED
    job = world.stop(other)
    job.join(Request(FORCE | NOWAIT))
    with pytest.raises(Failed, match="as soon as it can"):
        job.hold(ROOT)
    world.clock.advance(0.06)
    assert other.sent == [SIGTERM, SIGKILL]
    with pytest.raises(Failed):
        job.hold(ROOT)


def test_force_is_saved_although_sigkill_was_about_to_be_sent(
    world: World, store: SlowStore
) -> None:
    """SIGKILL may have to wait: the process's executable may become unreadable right now."""
    job = world.stop(FakeProcess(), FORCE | FIXED)
    world.clock.advance(10)
    assert job.phase is Phase.KILL
    job.force(ROOT)
    assert store._saved is not None and store._saved.forced


@pytest.mark.parametrize(
    ("act", "result"),
    [
        (lambda job: job.force(ROOT), Result.KILLED),
        (lambda job: job.join(Request(FORCE | NOWAIT, uid=1000)), Result.SIGNALLED),
    ],
)
def test_a_reply_of_the_guest_does_not_undo_force(
    world: World, store: SlowStore, act: Callable[[Job], None], result: Result
) -> None:
    """The reply comes after Force. With NOWAIT, a job normally ends at this reply."""
    process = FakeProcess()
    world.monitors.shows = lambda now: UP
    world.monitors.on_order = lambda order: act(job)
    job = world.stop(process, Flag.POWERDOWN | NOWAIT)
    world.clock.advance(0.04)
    assert (job.running, process.sent) == (True, [])
    world.clock.advance(0.02)
    assert process.sent == [SIGKILL]
    process.wake()
    assert job.result is result
