"""The service on one bus connection, from requesting the name to releasing it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final

from qkilld.bus.connection import Connection, connect
from qkilld.bus.guest_objects import Guests
from qkilld.bus.job_signals import Announcer
from qkilld.bus.manager_object import ManagerObject, ManagerTree
from qkilld.bus.polkit import Polkit
from qkilld.bus.server import Server
from qkilld.bus.systemd import Systemd
from qkilld.engine.observers import Observers
from qkilld.engine.service import Service
from qkilld.engine.turns import Turns
from qkilld.model.bus_address import POLICY_ADVICE, BusAddress
from qkilld.model.constants import BUS_NAME
from qkilld.model.errors import NameRefused, QkilldError, RefusedByBus

DRAIN_TIMEOUT_S: Final = 2.0
"""Time to send the last replies."""
ASK_TIMEOUT_S: Final = 1.0
"""Time for systemd to report which job is queued for our unit."""


class BusService:
    """Created by `serve`, closed by the caller."""

    def __init__(
        self,
        connection: Connection,
        bus: BusAddress,
        service: Service,
        observers: Observers,
        turns: Turns,
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        self._connection = connection
        self._service = service
        self._observers = observers
        tree = ManagerTree(ManagerObject(service), service)
        self.polkit = (
            Polkit(connection, connect_again=lambda: connect(bus, descriptors=True))
            if bus.is_system_bus
            else None
        )
        """None if this is not the system bus."""
        self._server = Server(
            connection,
            tree,
            on_fault=on_fault,
            turns=turns,
            authority=self.polkit,
        )
        tree.guests = self._guests = Guests(connection, service, self._server, on_fault)
        self._announcer = Announcer(self._server)
        for job in service.registry:
            if job.running:
                self._announcer.adopt(job)
        observers.add(self._announcer)
        service.units = Systemd(connection)

    @property
    def busy(self) -> bool:
        """Whether calls are open or a client watches guests."""
        return self._server.busy or self._guests.watch.active

    async def wait_closed(self) -> None:
        await self._connection.wait_closed()

    async def own_job(self) -> str:
        """Return the type of systemd's job for our unit: stop, restart, …; "" if there is none, or
        if systemd does not answer."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await Systemd(self._connection).own_job()
        except (QkilldError, TimeoutError):
            return ""

    async def leave(self) -> None:
        """Release the bus name, then answer every call that was sent to it. Signals about ended
        jobs are sent first, because clients may ignore signals from anyone but the name's owner."""
        await self._announcer.drain()
        with contextlib.suppress(QkilldError):
            await self._connection.disown(BUS_NAME)
        await self._server.drain(DRAIN_TIMEOUT_S)
        await self._announcer.drain()
        await self._connection.flush()

    async def own(self) -> bool:
        """Request the name; return whether we have it. Raises RefusedByBus, BusError."""
        return await self._connection.own(BUS_NAME)

    def close(self) -> None:
        self._observers.remove(self._announcer)
        self._announcer.close()
        self._guests.watch.close()
        self._service.units = None
        self._server.close()
        self._connection.close()


async def serve(
    bus: BusAddress,
    service: Service,
    observers: Observers,
    turns: Turns,
    on_fault: Callable[[str, BaseException], None],
) -> BusService:
    """Serve a bus under our name.

    Raises NameRefused if the bus denies us the name or another process has it, BusError for any
    other failure.
    """
    connection = await connect(bus)
    try:
        bus_service = BusService(connection, bus, service, observers, turns, on_fault)
    except BaseException:
        connection.close()
        raise
    try:
        is_owner = await bus_service.own()
    except RefusedByBus:
        bus_service.close()
        raise NameRefused(_refusal(bus)) from None
    except BaseException:
        bus_service.close()
        raise
    if not is_owner:
        bus_service.close()
        raise NameRefused(
            f"another process has the name {BUS_NAME} on this bus already: "
            "is qkilld running here? See `qkillctl status`"
        )
    return bus_service


def _refusal(bus: BusAddress) -> str:
    """Explain why the bus denied us our name, and what to do."""
    uid = os.geteuid()
    text = f"the {bus.title} does not let uid {uid} own the name {BUS_NAME}"
    if not bus.is_system_bus:
        return f"{text}: see its policy"
    if uid != 0:
        return f"{text}: run it as root, or with --user for guests of your own"
    return f"{text}. {POLICY_ADVICE}"
