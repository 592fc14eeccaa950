"""One run for all concurrent callers."""

from __future__ import annotations

import asyncio

import pytest

from qkilld.engine.coalesce import MAX_PAUSE_S, PAUSE_FACTOR, SharedRun


class Work:
    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        number = self.runs
        await self.go.wait()
        if number == 3:
            raise OSError
        return number


def test_callers_during_a_run_share_the_next_one() -> None:
    async def run() -> None:
        work = Work()
        shared = SharedRun(work)
        first = [asyncio.create_task(shared.get()) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert work.runs == 1
        second = [asyncio.create_task(shared.get()) for _ in range(100)]
        await asyncio.sleep(0)
        # A cancelled caller does not affect the others.
        first.pop().cancel()
        second.pop().cancel()
        work.go.set()
        assert set(await asyncio.gather(*first)) == {1}
        assert set(await asyncio.gather(*second)) == {2}
        with pytest.raises(OSError):
            await shared.get()
        assert await shared.get() == 4

    asyncio.run(run())


def test_it_rests_between_runs() -> None:
    times: list[float] = []

    async def work() -> None:
        times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.02)
        times.append(asyncio.get_running_loop().time())

    async def run() -> None:
        shared = SharedRun(work)
        await shared.get()
        await shared.get()

    asyncio.run(run())
    first, end, second, _ = times
    assert second - end >= min(MAX_PAUSE_S, PAUSE_FACTOR * (end - first)) * 0.9
