"""What a client says to the daemon: one coroutine a method of the interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from qkilld.bus.connection import CALL_TIMEOUT_S, Connection
from qkilld.model.errors import BusError
from qkilld.model.words import BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, MANAGER_PATH, Flag

INTERACTIVE_CALL_TIMEOUT_S: Final = 150.0
"""More than the daemon gives whoever is asked for a password (bus.polkit)."""

_PROPERTIES = "org.freedesktop.DBus.Properties"
_SPANS = ("grace-usec", "stall-usec", "storage-stall-usec", "max-usec")
_OPTION_TYPES = {"start-time": "t", "reason": "s", **dict.fromkeys(_SPANS, "t")}


class Manager:
    """org.qkilld1.Manager on a bus. Every method raises what Connection.request raises."""

    def __init__(self, connection: Connection, *, interactive: bool = False) -> None:
        """`interactive`: polkit may ask somebody for a password, which takes its time."""
        self._connection = connection
        self._interactive = interactive

    async def terminate(
        self, pid: int, flags: Flag, options: dict[str, int | str] | None = None
    ) -> str:
        """The path of the job. `options` as in the interface: start-time, grace-usec, reason."""
        given = _variants(options)
        (job,) = await self._call("TerminateWithOptions", "uta{sv}", pid, int(flags), given)
        return str(job)

    async def terminate_unit(self, unit: str, flags: Flag) -> str:
        """The path of the job."""
        (job,) = await self._call("TerminateUnit", "st", unit, int(flags))
        return str(job)

    async def terminate_all(
        self, flags: Flag, options: dict[str, int | str]
    ) -> list[tuple[int, str]]:
        """(pid, path of the job) each."""
        (jobs,) = await self._call("TerminateAll", "ta{sv}", int(flags), _variants(options))
        return [tuple(job) for job in jobs]

    async def plan(
        self, pid: int, flags: Flag, options: dict[str, int | str] | None = None
    ) -> dict[str, Any]:
        """What `terminate` would do."""
        (plan,) = await self._call("Plan", "uta{sv}", pid, int(flags), _variants(options))
        return _plain(plan)

    async def inspect(self, pid: int) -> dict[str, Any]:
        (guest,) = await self._call("Inspect", "u", pid)
        return _plain(guest)

    async def list_guests(self) -> list[tuple[int, str, str, int, str]]:
        """(pid, name, UUID, uid, unit) each."""
        (guests,) = await self._call("ListGuests")
        return [tuple(guest) for guest in guests]

    async def list_jobs(self) -> list[tuple[int, str, int, str, str]]:
        """(id, path, pid, phase, verdict) each."""
        (jobs,) = await self._call("ListJobs")
        return [tuple(job) for job in jobs]

    async def job_by_pid(self, pid: int) -> str:
        (job,) = await self._call("GetJobByPID", "u", pid)
        return str(job)

    async def properties(self) -> dict[str, Any]:
        return await _get_all(self._connection, MANAGER_PATH, MANAGER_INTERFACE)

    async def owner(self) -> str:
        """The daemon's own name on the bus, another one in each of its lives; "" where there is
        none."""
        try:
            (owner,) = await self._connection.request_bus("GetNameOwner", "s", BUS_NAME)
        except BusError:
            return ""
        return str(owner)

    async def appears(self, timeout_s: float) -> bool:
        """Whether a daemon is there, now or within that time. Starts none."""
        there = asyncio.Event()

        def on_message(message: Message) -> None:
            if (
                message.message_type is MessageType.SIGNAL
                and message.sender == "org.freedesktop.DBus"
                and message.member == "NameOwnerChanged"
                and message.body[0] == BUS_NAME
                and message.body[2]
            ):
                there.set()

        rule = (
            "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
            f"member='NameOwnerChanged',arg0='{BUS_NAME}'"
        )
        self._connection.add_message_handler(on_message)
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.request_bus("AddMatch", "s", rule)
                (owned,) = await self._connection.request_bus("NameHasOwner", "s", BUS_NAME)
                if not owned:
                    await there.wait()
        except TimeoutError:
            return False
        finally:
            self._connection.remove_message_handler(on_message)
            self._connection.tell_bus("RemoveMatch", "s", rule)
        return True

    def job(self, path: str) -> Job:
        return Job(self._connection, path, interactive=self._interactive)

    async def _call(self, member: str, signature: str = "", *body: Any) -> list[Any]:
        return await self._connection.request(
            BUS_NAME,
            MANAGER_PATH,
            MANAGER_INTERFACE,
            member,
            signature,
            list(body),
            timeout_s=INTERACTIVE_CALL_TIMEOUT_S if self._interactive else CALL_TIMEOUT_S,
            interactive=self._interactive,
        )


class Job:
    """org.qkilld1.Job at a path."""

    def __init__(self, connection: Connection, path: str, *, interactive: bool = False) -> None:
        self._connection = connection
        self._interactive = interactive
        self.path = path

    async def wait(self) -> tuple[str, dict[str, Any]]:
        """(result, receipt), when the job has ended; without a time limit."""
        if not self._connection.connected:
            # There would be nothing to end the wait: a lost connection is announced only once.
            raise BusError("the connection to the bus is lost")
        result, receipt = await self._connection.request(
            BUS_NAME, self.path, JOB_INTERFACE, "Wait", timeout_s=None
        )
        return result, _plain(receipt)

    async def returns(self, timeout_s: float) -> bool:
        """After the daemon went away: whether one that goes on with its jobs is there within that
        time. Starts none."""
        return self._connection.connected and await Manager(self._connection).appears(timeout_s)

    async def cancel(self) -> None:
        await self._call("Cancel")

    async def extend(self, usec: int) -> None:
        await self._call("Extend", "t", usec)

    async def hold(self) -> None:
        await self._call("Hold")

    async def release(self) -> None:
        await self._call("Release")

    async def force(self) -> None:
        await self._call("Force")

    async def properties(self) -> dict[str, Any]:
        return await _get_all(self._connection, self.path, JOB_INTERFACE)

    async def _call(self, member: str, signature: str = "", *body: Any) -> None:
        await self._connection.request(
            BUS_NAME,
            self.path,
            JOB_INTERFACE,
            member,
            signature,
            list(body),
            timeout_s=INTERACTIVE_CALL_TIMEOUT_S if self._interactive else CALL_TIMEOUT_S,
            interactive=self._interactive,
        )

    @contextlib.asynccontextmanager
    async def watch(self, changed: Callable[[dict[str, Any]], None]) -> AsyncIterator[None]:
        """While entered, `changed` is called with properties by name: once with all of them, before
        the body runs, then with those that changed, each time some do.

        Only signals of the daemon itself count: any peer may send a signal that looks like it.
        """
        (owner,) = await self._connection.request_bus("GetNameOwner", "s", BUS_NAME)
        rule = (
            f"type='signal',sender='{BUS_NAME}',path='{self.path}',"
            f"interface='{_PROPERTIES}',member='PropertiesChanged',arg0='{JOB_INTERFACE}'"
        )
        complete = stale = False

        def on_message(message: Message) -> None:
            nonlocal stale
            if not (
                message.message_type is MessageType.SIGNAL
                and message.sender == owner
                and message.path == self.path
                and message.member == "PropertiesChanged"
                and message.signature == "sa{sv}as"
                and message.body[0] == JOB_INTERFACE
            ):
                return
            if complete:
                changed(_plain(message.body[1]))
            else:
                stale = True

        await self._connection.request_bus("AddMatch", "s", rule)
        self._connection.add_message_handler(on_message)
        try:
            properties = await self.properties()
            while stale:
                # Whether the change came before that reply or right behind it cannot be told.
                stale = False
                properties = await self.properties()
            complete = True
            changed(properties)
            yield
        finally:
            self._connection.remove_message_handler(on_message)
            self._connection.tell_bus("RemoveMatch", "s", rule)


async def _get_all(connection: Connection, path: str, interface: str) -> dict[str, Any]:
    (properties,) = await connection.request(
        BUS_NAME, path, _PROPERTIES, "GetAll", "s", [interface]
    )
    return _plain(properties)


def _variants(options: dict[str, int | str] | None) -> dict[str, Variant]:
    return {key: Variant(_OPTION_TYPES[key], value) for key, value in (options or {}).items()}


def _plain(variants: dict[str, Variant]) -> dict[str, Any]:
    return {key: variant.value for key, variant in variants.items()}
