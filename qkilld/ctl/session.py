"""One run of qkillctl: the bus, the connection to it, and the output."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import AsyncIterator
from typing import Any, Final

from qkilld.bus.client import ManagerProxy
from qkilld.bus.connection import Connection, connect
from qkilld.ctl.output import Output, user_name
from qkilld.ctl.process_stats import ProcessStats, process_stats
from qkilld.debug_log import ignore
from qkilld.model.bus_address import POLICY_ADVICE, BusAddress
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import AccessDenied, BusError, QkilldError, RefusedByBus

BUS_ERROR_NAME: Final = "org.qkilld1.Client.BusError"


def command_on(bus: BusAddress) -> str:
    if bus.address:
        return f"qkillctl --bus {shlex.quote(bus.address)}"
    words = ["qkillctl"]
    if bus.user:
        words.append("--user")
    if bus.host:
        at = f"{bus.host}/{bus.machine}" if bus.machine else bus.host
        words.append(f"-H {shlex.quote(at)}")
    elif bus.machine:
        words.append(f"-M {shlex.quote(bus.machine)}")
    return " ".join(words)


def _advice_for(bus: BusAddress) -> str:
    """Return advice for an unreachable daemon."""
    if bus.address:
        return "Check the address, and that a `qkilld --bus` runs on this bus"
    if bus.is_remote:
        return f"Check whether `{command_on(bus).replace('qkillctl', 'busctl', 1)} list` works"
    if bus.user:
        return (
            "Check `systemctl --user status qkilld`; without --user, qkillctl uses the system bus"
        )
    return "Check `systemctl status qkilld`; use --user or --bus if qkilld runs on another bus"


class NeedsRoot(AccessDenied):
    """The message says what to do."""


@dataclass(frozen=True, slots=True)
class Session:
    bus: BusAddress
    output: Output
    json: bool
    connection: Connection
    interactive: bool = False
    """Whether polkit may ask for a password."""
    varlink: str = ""
    """The daemon's Varlink socket; "" if it is unknown."""

    @property
    def command(self) -> str:
        """The command `qkillctl` with the options that select this bus."""
        return command_on(self.bus)

    def process_stats(self, pid: int, uid: int) -> ProcessStats:
        """Read the statistics of a process on the daemon's host; empty for a remote host."""
        return ProcessStats() if self.bus.is_remote else process_stats(pid, uid)

    def user_name(self, uid: int) -> str:
        """Return the name of a user on the daemon's host; for a remote host, the uid."""
        return str(uid) if self.bus.is_remote else user_name(uid)

    @property
    def manager(self) -> ManagerProxy:
        return ManagerProxy(self.connection, interactive=self.interactive)


@contextlib.asynccontextmanager
async def open_connection(bus: BusAddress) -> AsyncIterator[Connection]:
    """Open a connection for the duration of the context. Raises BusError."""
    connection = await connect(bus)
    try:
        if bus.host:
            with ignore("asking for the clock of the other host", QkilldError):
                connection.clock_offset = await ManagerProxy(connection).clock_offset()
        yield connection
    finally:
        connection.close()


def explain(error: Exception, bus: BusAddress) -> str:
    """For bus errors, name the bus and give advice."""
    text = str(error) or type(error).__name__
    if isinstance(error, RefusedByBus):
        return f"{text} ({bus.title}). {POLICY_ADVICE if bus.is_system_bus else _advice_for(bus)}"
    if isinstance(error, AccessDenied) and not isinstance(error, NeedsRoot) and os.geteuid() != 0:
        return f"{text}. {_authorization_advice(bus)}"
    if not isinstance(error, BusError):
        return text
    which = "" if bus.title in text else f" ({bus.title})"
    return f"{text}{which}. {_advice_for(bus)}"


def _authorization_advice(bus: BusAddress) -> str:
    if bus.is_remote:
        return "You must be root or the guest's owner on that host"
    if bus.user or bus.address:
        return "Only the guest's owner may do that on this bus; polkit serves only the system bus"
    return (
        "Run this as root, in a session with a polkit agent, or on a terminal without "
        "--no-ask-password"
    )


def error_as_json(error: Exception, bus: BusAddress) -> dict[str, Any]:
    """Return {name, message}. The name is the error's D-Bus name, or a name that
    begins with org.qkilld1.Client."""
    name = BUS_ERROR_NAME if isinstance(error, BusError) else getattr(error, "bus_name", "")
    return {"name": name, "message": explain(error, bus)}
