"""Client side of org.qkilld1: one coroutine for each method of the interface."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

from qkilld.bus.connection import CALL_TIMEOUT_S, Connection
from qkilld.bus.library import Variant
from qkilld.bus.values import VariantValue
from qkilld.model.constants import (
    BUS_NAME,
    JOB_INTERFACE,
    MANAGER_INTERFACE,
    MANAGER_PATH,
    UNKNOWN,
    Flag,
)
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.policy import JOB_SPANS

if TYPE_CHECKING:
    from qkilld.model.job_status import JobStatus

INTERACTIVE_CALL_TIMEOUT_S: Final = 150.0
"""Longer than the time for a person to enter a password (bus.polkit.INTERACTIVE_TIMEOUT_S)."""

_PROPERTIES = "org.freedesktop.DBus.Properties"
_OWNER_RULE: Final = (
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
    f"member='NameOwnerChanged',arg0='{BUS_NAME}'"
)
_OPTION_TYPES = {
    "start-time": "t",
    "reason": "s",
    **{span.bus_option: "t" for span in JOB_SPANS},
    "powerdown-max-usec": "t",
    "qmp-socket": "s",
    **dict.fromkeys(("powerdown-as-configured", "powerdown-only", "resume", "wake", "thaw"), "b"),
}


class ManagerProxy:
    """org.qkilld1.Manager on a bus. Every method raises what Connection.request raises."""

    def __init__(self, connection: Connection, *, interactive: bool = False) -> None:
        """With `interactive`, polkit may ask for a password, and calls wait up to
        INTERACTIVE_CALL_TIMEOUT_S."""
        self._connection = connection
        self._interactive = interactive

    async def terminate(
        self, pid: int, flags: Flag, options: dict[str, int | str] | None = None
    ) -> str:
        """Return the path of the job. `options` are those of TerminateWithOptions."""
        variants = _variants(options)
        (job,) = await self._call("TerminateWithOptions", "uta{sv}", pid, int(flags), variants)
        return str(job)

    async def terminate_unit(self, unit: str, flags: Flag) -> str:
        """Return the path of the job."""
        (job,) = await self._call("TerminateUnit", "st", unit, int(flags))
        return str(job)

    async def terminate_all(
        self, flags: Flag, options: dict[str, int | str]
    ) -> list[tuple[int, str]]:
        """Return a (pid, job path) for each guest."""
        (jobs,) = await self._call("TerminateAll", "ta{sv}", int(flags), _variants(options))
        return [tuple(job) for job in jobs]

    async def plan(
        self, pid: int, flags: Flag, options: dict[str, int | str] | None = None
    ) -> dict[str, Any]:
        """Return what `terminate` would do: the reply of the method Plan."""
        (plan,) = await self._call("Plan", "uta{sv}", pid, int(flags), _variants(options))
        return _plain(plan)

    async def inspect(self, pid: int) -> dict[str, Any]:
        (guest,) = await self._call("Inspect", "u", pid)
        return _plain(guest)

    async def list_guests(self) -> list[tuple[int, str, str, int, str]]:
        """Return (pid, name, UUID, uid, unit) for each guest."""
        (guests,) = await self._call("ListGuests")
        return [tuple(guest) for guest in guests]

    async def list_jobs(self) -> list[tuple[int, str, int, str, str]]:
        """Return (id, path, pid, phase, verdict) for each job."""
        (jobs,) = await self._call("ListJobs")
        return [tuple(job) for job in jobs]

    async def job_by_pid(self, pid: int) -> str:
        (job,) = await self._call("GetJobByPID", "u", pid)
        return str(job)

    async def properties(self) -> dict[str, Any]:
        return await _get_all(self._connection, MANAGER_PATH, MANAGER_INTERFACE)

    async def clock_offset(self) -> int:
        """Return how far CLOCK_MONOTONIC of the daemon's host is ahead of ours (µs); 0 if an older
        daemon does not report it."""
        before = time.monotonic_ns() // 1000
        properties = await self.properties()
        after = time.monotonic_ns() // 1000
        now: int | None = properties.get("NowUSec")
        return 0 if now is None else now - (before + after) // 2

    @property
    def is_remote(self) -> bool:
        """Whether the daemon runs on another host or in a container, with other processes, users
        and files."""
        return self._connection.is_remote

    async def owner(self) -> str:
        """Return the daemon's unique bus name, which changes with each start; "" if unknown."""
        try:
            (owner,) = await self._connection.request_bus("GetNameOwner", "s", BUS_NAME)
        except BusError:
            return ""
        return str(owner)

    async def appears(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for a daemon to own the name; return whether one does. Starts no
        daemon."""
        appeared = asyncio.Event()

        def owner_changed(body: list[Any]) -> None:
            name, _, owner = body
            if name == BUS_NAME and owner:
                appeared.set()

        unsubscribe = self._connection.watch_names(owner_changed)
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.request_bus("AddMatch", "s", _OWNER_RULE)
                (owned,) = await self._connection.request_bus("NameHasOwner", "s", BUS_NAME)
                if not owned:
                    await appeared.wait()
        except TimeoutError:
            return False
        finally:
            unsubscribe()
            self._connection.tell_bus("RemoveMatch", "s", _OWNER_RULE)
        return True

    @contextlib.asynccontextmanager
    async def watch(
        self,
        job_new: Callable[[str], None],
        job_removed: Callable[[str], None],
        owner_changed: Callable[[str], None],
    ) -> AsyncIterator[str]:
        """While the context is open, call back when a job begins or ends, and when the daemon ends
        or another starts. Yield the daemon's bus name, or "" if no daemon runs. Starts no daemon.

        `job_new` and `job_removed` get the job's path. `owner_changed` gets the new daemon's bus
        name, or "". While the context is open, JobProxy.watch can be called with `matched`.
        """
        owner = ""
        unsubscribe: list[Callable[[], None]] = []

        def subscribe(now: str) -> None:
            nonlocal owner
            owner = now
            for end in unsubscribe:
                end()
            unsubscribe.clear()
            for member, signature, call in (
                ("JobNew", "uou", job_new),
                ("JobRemoved", "uous", job_removed),
            ):
                if owner:
                    unsubscribe.append(self._subscribe(owner, member, signature, call))

        def names_changed(body: list[Any]) -> None:
            name, _, now = body
            if name == BUS_NAME and now != owner:
                subscribe(now)
                owner_changed(now)

        rules = (_OWNER_RULE, f"type='signal',sender='{BUS_NAME}',path_namespace='{MANAGER_PATH}'")
        end = self._connection.watch_names(names_changed)
        try:
            for rule in rules:
                await self._connection.request_bus("AddMatch", "s", rule)
            subscribe(await self.owner())
            yield owner
        finally:
            end()
            subscribe("")
            for rule in rules:
                self._connection.tell_bus("RemoveMatch", "s", rule)

    def _subscribe(
        self, owner: str, member: str, signature: str, call: Callable[[str], None]
    ) -> Callable[[], None]:
        return self._connection.subscribe(
            owner, MANAGER_PATH, MANAGER_INTERFACE, member, signature, lambda body: call(body[1])
        )

    def job(self, path: str) -> JobProxy:
        return JobProxy(self._connection, path, interactive=self._interactive)

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


class JobProxy:
    """The object org.qkilld1.Job at `path`."""

    def __init__(self, connection: Connection, path: str, *, interactive: bool = False) -> None:
        self._connection = connection
        self._interactive = interactive
        self.path = path

    async def wait(self) -> tuple[str, dict[str, Any]]:
        """Wait without a time limit for the job to end; return (result, receipt)."""
        if not self._connection.connected:
            raise BusError("the connection to the bus is lost")
        result, receipt = await self._connection.request(
            BUS_NAME, self.path, JOB_INTERFACE, "Wait", timeout_s=None
        )
        return result, _plain(receipt)

    async def returns(self, timeout_s: float) -> bool:
        """After the daemon has disappeared, wait up to `timeout_s` for another daemon, which
        continues its jobs. Return whether one has appeared. Starts no daemon."""
        return self._connection.connected and await ManagerProxy(self._connection).appears(
            timeout_s
        )

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

    async def status(self) -> JobStatus:
        return self._status(await self._properties())

    def _status(self, properties: dict[str, Any]) -> JobStatus:
        return job_status(self.path, properties, self._connection.clock_offset)

    async def _properties(self) -> dict[str, Any]:
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
    async def watch(
        self, changed: Callable[[JobStatus], None], *, matched: bool = False
    ) -> AsyncIterator[None]:
        """While the context is open, call `changed` with the job's status: once at entry, then at
        each change.

        Signals of other senders are ignored, because any peer can send one that looks the same.
        Pass `matched` if the bus already has a match rule for these signals.
        """
        (owner,) = await self._connection.request_bus("GetNameOwner", "s", BUS_NAME)
        rule = (
            f"type='signal',sender='{BUS_NAME}',path='{self.path}',"
            f"interface='{_PROPERTIES}',member='PropertiesChanged',arg0='{JOB_INTERFACE}'"
        )
        complete = stale = False
        properties: dict[str, Any] = {}
        invalidated: set[str] = set()
        """Properties whose new values must be read, because the signal did not contain them."""
        outdated = asyncio.Event()

        def on_change(body: list[Any]) -> None:
            nonlocal stale
            interface, values, names = body
            if interface != JOB_INTERFACE:
                return
            if complete:
                properties.update(_plain(values))
                changed(self._status(properties))
                invalidated.update(names)
                if invalidated:
                    outdated.set()
            else:
                stale = True

        async def refresh() -> None:
            while True:
                await outdated.wait()
                outdated.clear()
                names = properties.keys() & invalidated
                invalidated.clear()
                with contextlib.suppress(QkilldError):
                    now = await self._properties()
                    # Take only the invalidated properties from the reply. For all others, a signal
                    # received meanwhile may contain newer values.
                    properties.update({name: now[name] for name in names})
                    changed(self._status(properties))

        if not matched:
            await self._connection.request_bus("AddMatch", "s", rule)
        unsubscribe = self._connection.subscribe(
            owner, self.path, _PROPERTIES, "PropertiesChanged", "sa{sv}as", on_change
        )
        try:
            properties.update(await self._properties())
            while stale:
                # A property changed during the read. The reply may be older than the change, so
                # read again.
                stale = False
                properties.update(await self._properties())
            complete = True
            changed(self._status(properties))
            refreshing = asyncio.get_running_loop().create_task(refresh())
            try:
                yield
            finally:
                refreshing.cancel()
        finally:
            unsubscribe()
            if not matched:
                self._connection.tell_bus("RemoveMatch", "s", rule)


def job_status(path: str, properties: dict[str, Any], clock_offset: int = 0) -> JobStatus:
    """Parse the properties of org.qkilld1.Job. Times are converted to our clock: `clock_offset`
    (µs) is how far CLOCK_MONOTONIC of the daemon's host is ahead of ours."""
    # Imported late, because it takes 1 ms and an idle guest exits before its status is needed.
    from qkilld.model.job_status import JobStatus
    from qkilld.model.text import printable

    def moment(name: str) -> int:
        # 0 is the default, because a daemon of an older release lacks some properties. 0 and
        # UINT64_MAX ("never") are not points in time, so they are not converted.
        value: int = properties.get(name, 0)
        return value - clock_offset if 0 < value < UNKNOWN else value

    return JobStatus(
        path=path,
        id=properties["Id"],
        pid=properties["PID"],
        start_time=properties["StartTime"],
        name=properties["Name"],
        uuid=properties["UUID"],
        unit=properties["Unit"],
        uid=properties["UID"],
        flags=Flag(properties["Flags"]),
        phase=printable(properties["Phase"]),
        verdict=printable(properties["Verdict"]),
        result=properties["Result"],
        started=moment("StartedUSec"),
        deadline=moment("DeadlineUSec"),
        last_progress=moment("LastProgressUSec") or None,
        bytes_written=_number(properties["BytesWritten"]),
        bytes_pending=_number(properties["BytesPending"]),
        held=properties["Held"],
        not_before=moment("NotBeforeUSec"),
        guest_asked=printable(properties.get("GuestAsked", "not-asked")),
        powerdown_only=properties.get("PowerdownOnly", False),
        next_rung=printable(properties.get("NextRung", "")),
        standstill=properties.get("NextRungStallUSec", 0),
        reasons=tuple(map(printable, properties.get("Reasons", ()))),
        rate=_number(properties.get("Rate", UNKNOWN)),
        reason=printable(properties.get("Reason", "")),
        requested_by=properties.get("RequestedBy"),
        ended=moment("EndedUSec") or None,
        receipt=_plain(receipt) if (receipt := properties.get("Receipt")) else None,
    )


def _number(value: int) -> int | None:
    return None if value == UNKNOWN else value


async def _get_all(connection: Connection, path: str, interface: str) -> dict[str, Any]:
    (properties,) = await connection.request(
        BUS_NAME, path, _PROPERTIES, "GetAll", "s", [interface]
    )
    return _plain(properties)


def _variants(options: dict[str, int | str] | None) -> dict[str, Variant]:
    return {key: Variant(_OPTION_TYPES[key], value) for key, value in (options or {}).items()}


def _plain(variants: dict[str, VariantValue]) -> dict[str, Any]:
    return {key: variant.value for key, variant in variants.items()}
