"""One run of qkillctl: which bus, the connection to it, and where the output goes."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from qkilld.bus.client import Manager
from qkilld.bus.connection import Connection, connect
from qkilld.ctl.output import Output
from qkilld.model.errors import AccessDenied, BusError

BUS_ERROR_NAME: Final = "org.qkilld1.Client.BusError"


@dataclass(frozen=True, slots=True)
class Bus:
    """Which bus the daemon is to be found on: the system bus unless something else is said."""

    user: bool = False
    address: str = ""

    @property
    def title(self) -> str:
        if self.address:
            return f"bus at {self.address}"
        return "session bus" if self.user else "system bus"

    @property
    def command(self) -> str:
        """`qkillctl` with what another run of it needs to get to the same bus."""
        if self.address:
            return f"qkillctl --bus {shlex.quote(self.address)}"
        return "qkillctl --user" if self.user else "qkillctl"

    @property
    def advice(self) -> str:
        """What to do where the daemon cannot be reached."""
        if self.address:
            return "Check the address, and that a `qkilld --bus` runs there"
        if self.user:
            return (
                "Check `systemctl --user status qkilld`; "
                "without --user it is looked for on the system bus"
            )
        return "Check `systemctl status qkilld`; use --user or --bus where it runs on another bus"


class NeedsRoot(AccessDenied):
    """What this program itself has to do and polkit cannot allow. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Session:
    bus: Bus
    output: Output
    json: bool
    connection: Connection
    interactive: bool = False
    """Polkit may ask for a password."""

    @property
    def manager(self) -> Manager:
        return Manager(self.connection, interactive=self.interactive)


@contextlib.asynccontextmanager
async def open_connection(bus: Bus) -> AsyncIterator[Connection]:
    """A connection, closed in the end. Raises BusError."""
    connection = await connect(bus.address or None, user=bus.user)
    try:
        yield connection
    finally:
        connection.close()


def explain(error: Exception, bus: Bus) -> str:
    """The text of an error for people; for one of the bus, which bus and what to do."""
    text = str(error) or type(error).__name__
    if isinstance(error, AccessDenied) and not isinstance(error, NeedsRoot):
        return f"{text}. {_how_to_be_let(bus)}"
    if not isinstance(error, BusError):
        return text
    which = "" if bus.title in text else f" ({bus.title})"
    return f"{text}{which}. {bus.advice}"


def _how_to_be_let(bus: Bus) -> str:
    if bus.user or bus.address:
        return "Only its own user may do that on this bus; on the system bus polkit can allow it"
    return (
        "Run it as root, or in a session with a polkit agent, or on a terminal without "
        "--no-ask-password"
    )


def error_as_json(error: Exception, bus: Bus) -> dict[str, Any]:
    """{name, message}: the name is the error's D-Bus name, or one of org.qkilld1.Client.*."""
    name = BUS_ERROR_NAME if isinstance(error, BusError) else getattr(error, "bus_name", "")
    return {"name": name, "message": explain(error, bus)}
