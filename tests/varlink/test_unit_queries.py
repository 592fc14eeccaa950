"""The number of queries of units that each user may have open."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from qkilld.engine.call_limits import MAX_WAITS, CallLimits
from qkilld.engine.job import Job
from qkilld.engine.service import Service
from qkilld.engine.unit_stop import UnitLimits, UnitStops
from qkilld.model.policy import Config
from qkilld.varlink.unit_queries import MAX_AT_ONCE, OF_ROOT, UnitQueries
from tests.engine.conftest import FakeProcess, World, make_guest
from tests.engine.test_service import FakeHost


class SlowUnits(UnitStops):
    """A query blocks until the event of its caller in `ends` is set or, if it has none, until
    `goes_on` is set. The caller with process id N stops N.service."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, lambda pid: None, user=False)
        self.goes_on = asyncio.Event()
        self.ends: dict[int, asyncio.Event] = {}
        """Keyed by process id."""
        self.running: Counter[int] = Counter()
        """The queries that run now, by uid."""
        self.count = 0

    def reason(self, pid: int) -> str:
        return f"ExecStop of {pid}.service"

    async def limit(self, jobs: Sequence[Job], pid: int, uid: int, *, force: bool) -> UnitLimits:
        self.running[uid] += 1
        self.count += 1
        await self.ends.get(pid, self.goes_on).wait()
        self.running[uid] -= 1
        return UnitLimits(f"{pid}.service", None)


class Queries:
    """Create it in a running loop."""

    def __init__(self) -> None:
        self.world = World()
        registry, clock, sampler = self.world.registry, self.world.clock, self.world.sampler
        self.units = SlowUnits(Service(Config(), FakeHost(), registry, clock, sampler))
        self.limits = CallLimits(frozenset({0}))
        self._queries = UnitQueries(self.units, self.limits)
        self._tasks: list[asyncio.Task[UnitLimits]] = []

    def job(self, pid: int = 4711) -> Job:
        return self.world.stop(FakeProcess(make_guest(pid=pid)))

    async def ask(self, job: Job, pid: int, uid: int) -> None:
        query = self._queries.limit([job], pid, uid, force=False)
        self._tasks.append(asyncio.create_task(query))
        await asyncio.sleep(0)

    async def end(self) -> list[UnitLimits]:
        self.units.goes_on.set()
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*self._tasks)
        assert not self.units.running.total() and not self.limits._running
        return outcomes


def test_one_query_for_each_job_and_unit() -> None:
    async def ask() -> None:
        queries = Queries()
        jobs = [queries.job(), queries.job(4712)]
        for _ in range(20):
            for job in jobs:
                await queries.ask(job, 1, 1000)
        assert queries.units.running == {1000: len(jobs)}
        await queries.ask(jobs[0], 2, 1000)
        assert queries.units.running == {1000: len(jobs) + 1}
        await queries.end()
        assert queries.units.count == 41

    asyncio.run(ask())


def test_every_user_gets_a_place_and_root_keeps_some() -> None:
    async def ask() -> None:
        queries = Queries()
        job = queries.job()
        for pid in range(100):
            await queries.ask(job, pid, 1000)
        for uid in range(1001, 1101):
            await queries.ask(job, uid, uid)
        running = +queries.units.running
        assert running.total() == MAX_AT_ONCE - OF_ROOT
        assert running[1001] == running[1002] == 1
        for pid in range(3000, 3100):
            await queries.ask(job, pid, 0)
        assert queries.units.running[0] == OF_ROOT
        outcomes = await queries.end()
        assert {outcome.name for outcome in outcomes} >= {"99.service", "1100.service"}
        assert queries.units.count == 300

    asyncio.run(ask())


def test_a_place_goes_to_a_user_behind_many_subordinate_uids() -> None:
    async def ask() -> None:
        queries = Queries()
        queries.units.ends[1] = asyncio.Event()
        job = queries.job()
        for uid in range(100_000, 100_100):
            await queries.ask(job, uid, uid)
        for pid in (1, 2, 3):
            await queries.ask(job, pid, 1000 + pid)
        assert queries.units.running[1002] and not queries.units.running[1003]
        queries.units.ends[1].set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not queries.units.running[1001] and queries.units.running[1003]
        await queries.end()

    asyncio.run(ask())


def test_root_does_not_wait_for_queries_of_the_owner() -> None:
    async def ask() -> None:
        queries = Queries()
        job = queries.job()
        for _ in range(100):
            await queries.ask(job, 1, 1000)
        await queries.ask(job, 1, 0)
        assert queries.units.running == {1000: 1, 0: 1}
        await queries.end()

    asyncio.run(ask())


def test_queries_that_wait_are_limited() -> None:
    async def ask() -> None:
        queries = Queries()
        job = queries.job()
        for _ in range(MAX_WAITS + 1):
            await queries.ask(job, 1, 1000)
        await queries.ask(job, 2, 1001)
        outcomes = await queries.end()
        refused = [outcome.why for outcome in outcomes if outcome.why]
        assert len(refused) == 1 and "1024 calls of Wait" in refused[0]
        assert outcomes[-1].name == "2.service"

    asyncio.run(ask())


def test_no_query_for_a_job_that_has_ended() -> None:
    async def ask() -> None:
        queries = Queries()
        process = FakeProcess()
        job = queries.world.stop(process)
        for _ in range(3):
            await queries.ask(job, 1, 1000)
        process.die()
        outcomes = await queries.end()
        assert queries.units.count == 1
        assert [outcome.why for outcome in outcomes] == ["", *["the stop has ended"] * 2]

    asyncio.run(ask())
