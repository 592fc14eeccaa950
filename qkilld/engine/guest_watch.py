"""Watch which guests appear and disappear on this host, while a client is interested."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from qkilld.engine.long_replies import Pace
from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Guest, GuestChannels

if TYPE_CHECKING:
    from qkilld.engine.ports import Monitors

SCAN_INTERVAL_S: Final = 2.0
"""The time between scans. A scan reads all of /proc, and takes 0.1 ms for each process."""
MAX_SURVEYS: Final = 8
"""The maximum number of guests whose command lines are read at a time."""


@dataclass(frozen=True, slots=True)
class WatchedGuest:
    number: int
    """The guest keeps this number while its process lives and guests are watched. The number is
    never reused."""
    guest: Guest
    channels: GuestChannels


class GuestListener(Protocol):
    def guest_new(self, guest: WatchedGuest) -> None: ...

    def guest_changed(self, before: WatchedGuest, now: WatchedGuest) -> None: ...

    def guest_gone(self, guest: WatchedGuest) -> None: ...


class GuestWatch:
    """Use it in a single running loop."""

    def __init__(
        self,
        find_guests: Callable[[], Awaitable[list[Guest]]],
        monitors: Monitors | None,
        listener: GuestListener,
        is_wanted: Callable[[], Awaitable[bool]],
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        """`is_wanted` is called before each scan except the first. If it returns False, the watch
        ends, and no WatchedGuest.number is valid any more."""
        self._find_guests = find_guests
        self._monitors = monitors
        self._listener = listener
        self._is_wanted = is_wanted
        self._on_fault = on_fault
        self._guests: dict[tuple[int, int], WatchedGuest] = {}
        self._keys: dict[int, tuple[int, int]] = {}
        """The key of each guest in `_guests`, by its number."""
        self._last_number = 0
        self._scanning: asyncio.Task[None] | None = None
        self._first_scan: asyncio.Future[None] | None = None

    @property
    def active(self) -> bool:
        return self._scanning is not None

    @property
    def known(self) -> Iterable[WatchedGuest]:
        """The guests that the last scan found."""
        return tuple(self._guests.values())

    def get(self, number: int) -> WatchedGuest | None:
        key = self._keys.get(number)
        return None if key is None else self._guests[key]

    async def guests(self) -> Iterable[WatchedGuest]:
        """Start to watch if necessary, and wait for the first scan. Return the guests that the last
        scan found.

        Raises what the first scan raises. The next call then starts to watch again.
        """
        if self._scanning is None:
            loop = asyncio.get_running_loop()
            self._first_scan = loop.create_future()
            self._scanning = loop.create_task(self._scan_for_ever(self._first_scan))
        assert self._first_scan is not None
        await asyncio.shield(self._first_scan)
        return self.known

    def close(self) -> None:
        if self._scanning is not None:
            self._scanning.cancel()
            self._end()

    def _end(self) -> None:
        first, self._first_scan = self._first_scan, None
        if first is not None and not first.done():
            first.cancel()
        self._scanning = None
        self._guests.clear()
        self._keys.clear()

    async def _scan_for_ever(self, first: asyncio.Future[None]) -> None:
        try:
            try:
                await self._scan(tell=False)
            except Exception as error:
                first.set_exception(error)
                first.exception()  # Avoid asyncio's warning about an unread exception.
                return
            first.set_result(None)
            while True:
                await asyncio.sleep(SCAN_INTERVAL_S)
                try:
                    if not await self._is_wanted():
                        break
                    await self._scan(tell=True)
                except Exception as error:
                    # Continue to watch, because the next scan may succeed.
                    self._on_fault("looking for guests", error)
        finally:
            # However the watch ends, the next call of `guests` starts another watch.
            if self._scanning is asyncio.current_task():
                self._end()

    async def _scan(self, *, tell: bool) -> None:
        guests = {guest.identity.key: guest for guest in await self._find_guests()}
        pace = Pace()
        for key, lost_guest in list(self._guests.items()):
            if key not in guests:
                del self._guests[key], self._keys[lost_guest.number]
                self._listener.guest_gone(lost_guest)
            await pace.rest()
        fresh = [guest for key, guest in guests.items() if key not in self._guests]
        channels = await self._survey(fresh)
        for guest, ways in zip(fresh, channels, strict=True):
            self._last_number += 1
            watched = WatchedGuest(self._last_number, guest, ways)
            self._guests[guest.identity.key] = watched
            self._keys[self._last_number] = guest.identity.key
            if tell:
                self._listener.guest_new(watched)
            await pace.rest()
        for key, guest in guests.items():
            before = self._guests[key]
            if before.guest.label != guest.label or before.guest.identity.uid != guest.identity.uid:
                now = WatchedGuest(before.number, guest, before.channels)
                self._guests[key] = now
                self._listener.guest_changed(before, now)
            await pace.rest()

    async def _survey(self, guests: list[Guest]) -> list[GuestChannels]:
        monitors = self._monitors
        if monitors is None:
            return [GuestChannels()] * len(guests)
        slots = asyncio.Semaphore(MAX_SURVEYS)

        async def one(guest: Guest) -> GuestChannels:
            async with slots:
                return await monitors.survey(guest.identity)

        return await asyncio.gather(*(one(guest) for guest in guests))
