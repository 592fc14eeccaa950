"""Many samples are handed over at once, and none waits for another."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.handover import AT_ONCE, Handover


def test_in_order_and_in_portions_that_let_the_loop_look_around() -> None:
    got: list[int] = []
    between: list[int] = []

    def put_all(handover: Handover) -> None:
        for number in range(3 * AT_ONCE):
            handover.put(partial(got.append, number), more=number < 3 * AT_ONCE - 1)

    async def main() -> None:
        handover = Handover()
        handover.expect()
        thread = threading.Thread(target=put_all, args=(handover,))
        thread.start()
        thread.join()
        while len(got) < 3 * AT_ONCE:
            between.append(len(got))
            await asyncio.sleep(0)
        handover.close()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert got == list(range(3 * AT_ONCE))
    assert {AT_ONCE, 2 * AT_ONCE} <= set(between)


def test_an_urgent_one_precedes_those_that_wait() -> None:
    got: list[str] = []

    async def main() -> None:
        handover, done = Handover(), asyncio.Event()
        handover.put(partial(got.append, "first"), more=True)
        handover.put(partial(got.append, "urgent"), more=True, urgent=True)
        handover.put(done.set, more=True)
        await done.wait()
        handover.close()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert got == ["urgent", "first"]


@pytest.mark.parametrize("is_expected", [True, False])
def test_queued_calls_run_even_if_further_calls_block(is_expected: bool) -> None:
    """The queued calls run even if they come later than expected."""

    async def main() -> None:
        handover, called = Handover(), asyncio.Event()
        if is_expected:
            handover.expect()
        thread = threading.Thread(target=partial(handover.put, called.set, more=True))
        thread.start()
        thread.join()
        assert not called.is_set()
        await called.wait()
        handover.close()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_thread_that_outlives_the_loop_is_told_nothing() -> None:
    async def main() -> Handover:
        return Handover()

    asyncio.run(main()).put(lambda: None, more=False)


def test_one_that_raises_keeps_none_from_being_called_and_is_reported_once() -> None:
    reports: list[tuple[str, str]] = []

    def fail() -> None:
        raise LookupError("a fault of the engine")

    async def main() -> None:
        guard = FaultGuard(lambda doing, error: reports.append((doing, str(error))))
        guard.watch_callbacks(asyncio.get_running_loop())
        handover, came = Handover(), asyncio.Event()
        for _ in range(3):
            handover.put(fail, more=True)
        handover.put(came.set, more=False)
        await came.wait()
        handover.close()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert reports == [("running a callback", "a fault of the engine")]
