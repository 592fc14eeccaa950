"""One run for all who ask at the same time."""

from __future__ import annotations

import asyncio

import pytest

from qkilld.engine.shared import Shared


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


def test_who_asks_while_it_runs_shares_the_next_run() -> None:
    async def run() -> None:
        work = Work()
        shared = Shared(work)
        first = [asyncio.create_task(shared.get()) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert work.runs == 1
        second = [asyncio.create_task(shared.get()) for _ in range(100)]
        await asyncio.sleep(0)
        # Somebody leaves: the others have their answer all the same.
        first.pop().cancel()
        second.pop().cancel()
        work.go.set()
        assert set(await asyncio.gather(*first)) == {1}
        assert set(await asyncio.gather(*second)) == {2}
        with pytest.raises(OSError):
            await shared.get()
        assert await shared.get() == 4

    asyncio.run(run())
