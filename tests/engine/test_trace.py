"""The records of a job. A replay of them has the same result as the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from qkilld.decision.replay import replay
from qkilld.engine.job import Job
from qkilld.engine.registry import Registry
from qkilld.model.constants import Flag, Phase, Result, Verdict
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.model.sample import Io, Sample, Thread
from qkilld.model.trace import (
    ChangeRecord,
    EndRecord,
    ExitRecord,
    Header,
    Record,
    RungRecord,
    Trace,
    VerdictRecord,
)

from .conftest import IDLE, FakeProcess, S, World

FORCE = Flag.FORCE
WAITING = replace(IDLE, threads=(Thread(7, "worker", "D", 75, True, "folio_wait_bit"),))


@dataclass
class FakeTraces:
    """Remembers one trace."""

    header: Header | None = None
    records: list[Record] = field(default_factory=list)
    closed: int = 0

    def begin(self, header: Header) -> FakeTraces:
        assert self.header is None
        self.header = header
        return self

    def record(self, record: Record) -> None:
        assert not self.closed
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1

    @property
    def trace(self) -> Trace:
        assert self.header is not None
        return Trace(self.header, tuple(self.records))


@pytest.fixture
def traces() -> FakeTraces:
    return FakeTraces()


@pytest.fixture
def recorded(traces: FakeTraces) -> World:
    world = World()
    world.registry = Registry(
        Config(), world.clock, world.journal, world.observer, world.sampler, traces=traces
    )
    return world


def kinds(traces: FakeTraces) -> list[str]:
    return [type(record).__name__ for record in traces.records]


def test_the_story_of_a_job(recorded: World, traces: FakeTraces) -> None:
    process = FakeProcess()
    start = recorded.clock.now()
    job = recorded.stop(process, FORCE)
    recorded.clock.advance(0.45)
    process.die()
    assert kinds(traces) == ["RungRecord", "Sample", "Sample", "VerdictRecord", "EndRecord"]
    assert traces.closed == 1
    assert traces.header == Header(1, start, 4711, 99, "qemu", "web", FORCE, job.policy)
    assert traces.records[0] == RungRecord(start, Phase.TERMINATE, "SIGTERM")
    (turn,) = traces.trace.of(VerdictRecord)
    assert (turn.verdict, turn.at) == (Verdict.IDLE, start + 400_000)
    assert traces.records[-1] == EndRecord(start + 450_000, Result.EXITED)


def test_joining_requests_are_recorded(recorded: World, traces: FakeTraces) -> None:
    job = recorded.stop(FakeProcess())
    recorded.clock.advance(3)
    job.join(Request(FORCE, {"grace": 30 * S}))
    (change,) = traces.trace.of(ChangeRecord)
    assert (change.at, change.flags) == (recorded.clock.now(), FORCE)
    assert change.policy.grace == 30 * S
    recorded.clock.advance(40)
    assert replay(traces.trace).at == traces.trace.header.started + 30 * S
    job.cancel()


def test_the_end_of_a_survivor_is_part_of_it(recorded: World, traces: FakeTraces) -> None:
    process = FakeProcess()
    recorded.stop(process)
    recorded.clock.advance(20)
    assert kinds(traces)[-1] == "EndRecord"
    assert traces.closed == 0
    process.die()
    assert traces.records[-1] == ExitRecord(recorded.clock.now())
    assert traces.closed == 1


def test_the_trace_of_a_survivor_ends_where_a_new_job_takes_over(
    recorded: World, traces: FakeTraces
) -> None:
    recorded.stop(FakeProcess())
    recorded.clock.advance(20)
    traces.header = None
    recorded.stop(FakeProcess())
    assert traces.closed == 1


def test_a_job_that_cannot_start_records_nothing(recorded: World, traces: FakeTraces) -> None:
    with pytest.raises(Exception, match="exited"):
        recorded.stop(FakeProcess(dead=True))
    assert traces.records == []


@pytest.mark.parametrize(
    ("shows", "flags", "dies"),
    [
        (lambda now: IDLE, FORCE, None),
        (lambda now: WAITING, FORCE, None),
        (lambda now: Sample(now, "S"), FORCE, None),
        (lambda now: None, FORCE, None),
        (lambda now: replace(IDLE, state="T"), FORCE, None),
        (lambda now: replace(WAITING, io=Io(0, 0, 0, 0, 0, now, 0)), FORCE, 200.3),
        (lambda now: IDLE, Flag(0), None),
        (lambda now: IDLE, FORCE | Flag.FIXED, None),
        (lambda now: IDLE, Flag.FIXED, None),
        (lambda now: IDLE, FORCE, 9.9),
    ],
)
def test_a_replay_comes_to_the_same(
    recorded: World,
    traces: FakeTraces,
    shows: Callable[[int], Sample | None],
    flags: Flag,
    dies: float | None,
) -> None:
    recorded.sampler.shows = shows
    process = FakeProcess()
    job: Job = recorded.stop(process, flags)
    if dies is not None:
        recorded.clock.advance(dies)
        process.die()
    else:
        recorded.clock.advance(300)
        process.wake()
    replayed = replay(traces.trace)
    assert replayed.result is job.result
    rungs = [rung.at for rung in job.rungs if rung.phase is Phase.KILL]
    expected = rungs[0] if rungs else job.ended
    assert expected is not None
    # The job waits up to 1 s for a sample that never arrives; the replay does not.
    assert expected - S <= replayed.at <= expected
    if shows(0) is not None:
        assert replayed.at == expected
