"""Many jobs of an earlier daemon: the first samples are taken a few at a time, and are not lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from signal import SIGKILL, SIGTERM

import pytest

from qkilld.engine.job import Job
from qkilld.engine.job_saver import PROGRESS_INTERVAL, JobSaver
from qkilld.engine.ports import JobState, Process
from qkilld.engine.registry import Registry
from qkilld.engine.resumed_jobs import AT_ONCE, PAUSE
from qkilld.engine.snapshot import Snapshot
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag, Phase, Verdict
from qkilld.model.job import Request, Rung
from qkilld.model.policy import Config
from qkilld.model.sample import Sample

from .conftest import IDLE, FakeClock, FakeProcess, FakeSampler, S, World, make_guest
from .test_kill_written_down import SlowStore
from .test_snapshot import START, passed_on

MANY = 3 * AT_ONCE


class SlowSampler(FakeSampler):
    """Takes samples one by one. Each takes `span` seconds of the fake clock."""

    span = 0.025

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.waiting: list[tuple[int, Callable[[Sample], None]]] = []
        self.most = 0
        self.order: list[int] = []

    def watch(self, process: Process) -> SlowWatch:  # type: ignore[override]
        return SlowWatch(self, process.guest.identity.pid)

    def request(self, pid: int, callback: Callable[[Sample], None]) -> None:
        self.order.append(pid)
        self.waiting.append((pid, callback))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == 1:
            self._take()

    def _take(self) -> None:
        self._clock.call_at(self._clock.now() + int(self.span * S), self._taken)

    def _taken(self) -> None:
        _, callback = self.waiting.pop(0)
        if self.waiting:
            self._take()
        callback(replace(IDLE, at=self._clock.now()))


class SlowWatch:
    def __init__(self, sampler: SlowSampler, pid: int) -> None:
        self._sampler, self._pid = sampler, pid

    lacks_thread: bool = False

    def take_sample(
        self, callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        self._sampler.request(self._pid, callback)

    def close(self) -> None: ...


def start(world: World, graces: Sequence[int]) -> list[FakeProcess]:
    processes = [FakeProcess(make_guest(pid=100 + number)) for number in range(len(graces))]
    for process, grace in zip(processes, graces, strict=True):
        spans = {"grace": grace * S, "stall": S}
        world.registry.terminate(process, Request(Flag.FORCE, spans=spans))
    world.clock.advance(5)
    return processes


def crash(world: World, processes: list[FakeProcess]) -> tuple[World, SlowSampler, list[Job]]:
    after = World()
    after.clock.advance((world.clock.now() - START) / S + 1)
    sampler = SlowSampler(after.clock)
    after.registry = Registry(Config(), after.clock, after.journal, after.observer, sampler)
    resumed = []
    for process, job in zip(processes, world.registry, strict=True):
        process._callback = None
        past = passed_on(job.snapshot())
        resumed.append(after.registry.resume(process, past, among_many=True))
    return after, sampler, resumed


def test_a_few_at_a_time_and_none_counts_as_blocked() -> None:
    world = World()
    processes = start(world, [60] * MANY)
    after, sampler, resumed = crash(world, processes)
    assert sampler.order == []
    after.registry.follow_resumed()
    assert len(sampler.order) == AT_ONCE
    after.clock.advance(MANY * sampler.span + 2 * PAUSE / S)
    assert {*sampler.order} == {process.guest.identity.pid for process in processes}
    # A sample counts as blocked after one second, which is enough time for a few samples, but not
    # for all.
    assert sampler.most * sampler.span < 1 < MANY * sampler.span
    assert {job.verdict for job in resumed} == {Verdict.IDLE}
    assert all(turn.verdict is not Verdict.UNKNOWN for job in resumed for turn in job.history)


def test_the_most_urgent_is_first() -> None:
    world = World()
    processes = start(world, [60 - number for number in range(MANY)])
    after, sampler, _ = crash(world, processes)
    after.registry.follow_resumed()
    after.clock.advance(MANY * sampler.span + 2 * PAUSE / S)
    latest_first = [process.guest.identity.pid for process in processes]
    assert [*dict.fromkeys(sampler.order)] == latest_first[::-1]


def test_the_deadline_is_known_before_the_first_sample() -> None:
    world = World()
    processes = start(world, [60] * MANY)
    deadlines = [job.deadline for job in world.registry]
    after, sampler, resumed = crash(world, processes)
    after.registry.follow_resumed()
    before = [job.deadline for job in resumed]
    assert before == deadlines
    after.clock.advance(MANY * sampler.span + 2 * PAUSE / S)
    assert [job.deadline for job in resumed] == before


def test_one_that_is_due_is_killed_after_a_fresh_sample() -> None:
    world = World()
    processes = start(world, [8] * MANY)
    after, _, resumed = crash(world, processes)
    after.clock.advance(10)
    assert all(process.sent == [SIGTERM] for process in processes)
    after.registry.follow_resumed()
    assert all(process.sent == [SIGTERM] for process in processes)
    for _ in range(1000):
        after.clock.advance(0.05)
    assert all(process.sent == [SIGTERM, SIGKILL] for process in processes)
    assert {turn.verdict for job in resumed for turn in job.history} == {Verdict.IDLE}


def test_an_exit_is_seen_before_the_first_sample() -> None:
    world = World()
    processes = start(world, [60] * MANY)
    after, sampler, resumed = crash(world, processes)
    after.registry.follow_resumed()
    processes[-1].die()
    assert not resumed[-1].running
    after.clock.advance(MANY * sampler.span + 2 * PAUSE / S)
    assert processes[-1].guest.identity.pid not in sampler.order
    assert all(job.assessment is not None for job in resumed)


def test_a_fault_of_one_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    processes = start(world, [60] * MANY)
    after, sampler, resumed = crash(world, processes)

    follow = Job.follow

    def fail(job: Job) -> None:
        if job is resumed[0]:
            raise RuntimeError("a bug")
        follow(job)

    monkeypatch.setattr(Job, "follow", fail)
    with pytest.raises(RuntimeError):
        after.registry.follow_resumed()
    after.clock.advance(MANY * sampler.span + 2 * PAUSE / S)
    assert {*sampler.order} == {process.guest.identity.pid for process in processes[1:]}


def test_one_that_needs_no_sample_goes_on_at_once() -> None:
    world = World()
    process = FakeProcess(make_guest())
    world.registry.terminate(process, Request(Flag.FORCE | Flag.FIXED))
    world.clock.advance(1)
    after, _, (job,) = crash(world, [process])
    assert job.phase is Phase.TERMINATE and job.deadline == START + 10 * S
    after.clock.advance(20)
    assert process.sent == [SIGTERM, SIGKILL]


class ListedStore(SlowStore):
    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Snapshot] = []

    def save(self, state: JobState) -> None:
        assert isinstance(state, Snapshot)
        self.saved.append(state)


def with_store(world: World, down: float = 1) -> tuple[World, ListedStore]:
    """Return the world of the next daemon, `down` seconds after a crash, and its store."""
    after, store = World(), ListedStore()
    after.clock.advance((world.clock.now() - START) / S + down)
    after.sampler.shows = world.sampler.shows
    after.registry.saver = JobSaver(store, after.clock)
    return after, store


def test_a_state_is_saved_again_only_when_it_changes() -> None:
    world = World()
    (process,) = start(world, [60])
    (job,) = world.registry
    after, store = with_store(world)
    process._callback = None
    resumed = after.registry.resume(process, passed_on(job.snapshot()), among_many=True)
    after.registry.follow_resumed()
    assert store.saved == []
    resumed.hold(Steerer(0, Rank.ROOT))
    assert [state.control.held for state in store.saved] == [True]
    resumed.release(Steerer(0, Rank.ROOT))
    before = len(store.saved)
    after.clock.advance(2 * PROGRESS_INTERVAL / S)
    # The time of the latest sample is saved. Otherwise the next daemon would count the time since
    # the last save as time without samples.
    assert len(store.saved) > before


def test_a_sigkill_that_was_not_sent_is_removed_from_the_saved_state() -> None:
    world = World()
    (process,) = start(world, [60])
    (job,) = world.registry
    past = passed_on(job.snapshot())
    kill = Rung(Phase.KILL, SIGKILL.name, world.clock.now())
    after, store = with_store(world)
    process._callback = None
    after.registry.resume(process, replace(past, phase=Phase.KILL, rungs=(*past.rungs, kill)))
    assert [len(state.rungs) for state in store.saved] == [1]
