"""Serve /org/qkilld1/guest/N, the interface org.qkilld1.Guest, and its signals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from qkilld.bus import interfaces
from qkilld.bus.connection import Connection
from qkilld.bus.server import Method, Server
from qkilld.engine.guest_watch import GuestWatch, WatchedGuest
from qkilld.engine.service import Service
from qkilld.model.constants import GUEST_PATH_PREFIX

MAX_WATCHERS_PER_UID: Final = 16
"""The maximum number of connections remembered for each user. If there are more, the one that
called least recently is dropped."""


class GuestObject:
    """Implements bus.server.BusObject."""

    def __init__(self, guest: WatchedGuest) -> None:
        self.interface = interfaces.guest()
        self.methods: Mapping[str, Method] = {}
        self._guest = guest

    def properties(self, uid: int) -> Mapping[str, Any]:
        return guest_properties(self._guest)


def guest_path(guest: WatchedGuest) -> str:
    return f"{GUEST_PATH_PREFIX}{guest.number}"


def guest_properties(watched: WatchedGuest) -> dict[str, Any]:
    """Return the value of every property of the interface."""
    identity, label = watched.guest.identity, watched.guest.label
    return {
        "PID": identity.pid,
        "StartTime": identity.start_time,
        "Name": label.shown_name,
        "UUID": label.uuid,
        "Unit": label.unit_name,
        "UID": identity.uid,
        "Monitor": watched.channels.monitor.value,
        "Agent": watched.channels.agent.value,
    }


class Watchers:
    """The connections that called GetManagedObjects and were on the bus when last checked.

    The bus limits the number of our match rules, so we spend none on learning that a connection has
    left. Each scan for guests first calls `has_any`, which asks the bus.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._names: OrderedDict[str, int] = OrderedDict()
        """The uid of each name, the most recent caller last."""

    def add(self, name: str, uid: int) -> None:
        self._names.pop(name, None)
        names = [other for other, of in self._names.items() if of == uid]
        if len(names) >= MAX_WATCHERS_PER_UID:
            del self._names[names[0]]
        self._names[name] = uid

    async def has_any(self) -> bool:
        """Return whether one of the names is still on the bus; drop names that have left. Raises
        BusError."""
        while self._names:
            name = next(iter(self._names))
            (exists,) = await self._connection.request_bus("NameHasOwner", "s", name)
            if exists:
                return True
            self._names.pop(name, None)
        return False


class GuestSignals:
    """Implements engine.guest_watch.GuestListener."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def guest_new(self, guest: WatchedGuest) -> None:
        self._server.emit_added(guest_path(guest), interfaces.guest(), guest_properties(guest))

    def guest_changed(self, before: WatchedGuest, now: WatchedGuest) -> None:
        old, new = guest_properties(before), guest_properties(now)
        changed = {name: value for name, value in new.items() if old[name] != value}
        self._server.emit_changed(guest_path(now), interfaces.guest(), changed, ())

    def guest_gone(self, guest: WatchedGuest) -> None:
        self._server.emit_removed(guest_path(guest), interfaces.guest())


class Guests:
    """The guests as objects of one bus. qkilld scans for guests only while a client watches."""

    def __init__(
        self,
        connection: Connection,
        service: Service,
        server: Server,
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        self.watchers = Watchers(connection)
        self.watch = GuestWatch(
            service.guests,
            service.monitors,
            GuestSignals(server),
            self.watchers.has_any,
            on_fault,
        )
