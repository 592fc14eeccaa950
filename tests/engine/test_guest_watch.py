"""A watch that fails: each call gets an answer, and the next one tries again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from qkilld.engine import guest_watch
from qkilld.engine.guest_watch import GuestWatch, WatchedGuest
from qkilld.model.errors import Failed
from qkilld.model.guest import Guest
from tests.engine.conftest import make_guest

TIMEOUT_S = 30
FAULTS = [Failed("no /proc"), RuntimeError("a bug"), asyncio.CancelledError()]


class Scene:
    """Implements engine.guest_watch.GuestListener."""

    def __init__(self) -> None:
        self.fault: BaseException | None = None
        self.reported: asyncio.Queue[BaseException] = asyncio.Queue()
        self.new: asyncio.Queue[WatchedGuest] = asyncio.Queue()
        self.guests = [make_guest()]
        self.watch = GuestWatch(self._find, None, self, self._is_wanted, self._report)

    def _report(self, doing: str, error: BaseException) -> None:
        self.reported.put_nowait(error)

    async def _find(self) -> list[Guest]:
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        return self.guests

    async def _is_wanted(self) -> bool:
        return True

    async def look(self) -> Iterable[WatchedGuest]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.watch.guests()

    def guest_new(self, guest: WatchedGuest) -> None:
        self.new.put_nowait(guest)

    def guest_changed(self, before: WatchedGuest, now: WatchedGuest) -> None:
        raise AssertionError(now)

    def guest_gone(self, guest: WatchedGuest) -> None:
        raise AssertionError(guest)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_every_caller_hears_that_the_first_scan_failed(fault: BaseException) -> None:
    async def work() -> None:
        scene = Scene()
        scene.fault = fault
        both = await asyncio.gather(scene.look(), scene.look(), return_exceptions=True)
        assert [type(one) for one in both] == [type(fault)] * 2
        assert not scene.watch.active
        with pytest.raises(type(fault)):
            await scene.look()
        scene.fault = None
        assert [one.guest for one in await scene.look()] == scene.guests
        scene.watch.close()

    asyncio.run(work())


@pytest.mark.parametrize("fault", FAULTS[:2], ids=repr)
def test_a_later_scan_that_failed_is_repeated(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_watch, "SCAN_INTERVAL_S", 0.001)

    async def work() -> None:
        scene = Scene()
        await scene.look()
        scene.fault = fault
        async with asyncio.timeout(TIMEOUT_S):
            assert await scene.reported.get() is fault
        scene.guests, scene.fault = [make_guest(), make_guest(pid=4712)], None
        async with asyncio.timeout(TIMEOUT_S):
            assert (await scene.new.get()).guest.identity.pid == 4712
        assert len(tuple(await scene.look())) == 2
        scene.watch.close()

    asyncio.run(work())
