"""Guests that are left to their keepers: each is stopped in the end, even if the wait fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from qkilld.bus.connection import Connection
from qkilld.stop import keepers
from qkilld.stop.process import ProcessHandle
from tests.stop.fakes import FakeHandle


class FakeWatch:
    """Process 1 has a keeper that never finishes. Process 2 has no keeper."""

    def __init__(self, systemd: object) -> None: ...

    async def leave(self, process: ProcessHandle, tell: Callable[[str], None]) -> None:
        if process.pid == 1:
            tell("keeper.service")
            await asyncio.Event().wait()


@pytest.mark.parametrize("fails", [False, True], ids=["cancelled", "fails"])
def test_a_wait_that_ends_early_ends_all_of_it(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(keepers, "KeeperWatch", FakeWatch)
    released: list[int] = []
    processes = [FakeHandle(1), FakeHandle(2)]

    async def work() -> None:
        free = asyncio.Event()

        def release(some: Sequence[ProcessHandle]) -> None:
            released.extend(process.pid for process in some)
            free.set()
            if fails and released == [2]:
                raise ValueError

        waiting = asyncio.create_task(
            keepers.leave_all(cast(Connection, object()), processes, lambda *given: None, release)
        )
        await free.wait()
        if not fails:
            waiting.cancel()
        (end,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(end, ValueError if fails else asyncio.CancelledError)
        others: set[Any] = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    asyncio.run(work())
    for process in processes:
        process.close()
    assert sorted(released) == [1, 2]
