"""The Varlink calls of qkillctl, for two tasks that our D-Bus interface cannot do: passing the
daemon a connection to a guest's monitor, and following many jobs with one call."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final

from qkilld.adapters import procfs
from qkilld.adapters.loop_thread import run_in_thread
from qkilld.debug_log import note
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.errors import QkilldError

SYSTEM_SOCKET: Final = "/run/qkilld/org.qkilld1"
USER_SOCKET: Final = "qkilld/org.qkilld1"
"""The path of the socket below $XDG_RUNTIME_DIR."""
ANSWER_TIMEOUT_S: Final = 15.0
CONNECT_TIMEOUT_S: Final = 5.0
"""The limit for connecting to a guest's monitor. A hostile process can delay each step."""
_MAX_REPLY: Final = 64 << 20
_NEVER: Final = 2**62
"""An infinite time span."""
_UNITS: Final = {"usec": "USec"}


class VarlinkFailure(Exception):
    """The call cannot be made, or was refused. The caller then uses D-Bus instead."""


def socket_of(bus: BusAddress) -> str:
    """Return the path of the Varlink socket of this bus's daemon; "" if unknown."""
    if bus.is_system_bus:
        return SYSTEM_SOCKET
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{directory}/{USER_SOCKET}" if bus.user and not bus.is_remote and directory else ""


def order_of(flags: Flag, options: Mapping[str, int | str]) -> dict[str, Any]:
    """Convert flags and the options of TerminateWithOptions to parameters of Terminate."""
    order: dict[str, Any] = {
        "flags": [str(flag.name).lower() for flag in Flag if flag in flags],
        "options": {},
    }
    for name, value in options.items():
        first, *rest = name.split("-")
        key = first + "".join(_UNITS.get(word, word.capitalize()) for word in rest)
        if key == "startTime":
            order[key] = value
        else:
            order["options"][key] = _NEVER if value == INFINITY else value
    return order


async def monitor_to_pass(pid: int) -> socket.socket | None:
    """Connect to a guest's monitor that the daemon cannot reach. Return None if the guest has no
    such monitor, or if the connection fails."""
    from qkilld.monitor.reach import connect_passable

    work = run_in_thread(lambda: connect_passable(procfs.read_identity(pid)))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await asyncio.shield(work)
    except (TimeoutError, OSError, QkilldError) as error:
        note(f"connecting to the monitor of process {pid}", error)
    work.add_done_callback(_discard)
    return None


class VarlinkStream:
    """The replies to one call, on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._over = False
        self._timeout_s: float | None = ANSWER_TIMEOUT_S

    @classmethod
    async def open(
        cls,
        path: str,
        method: str,
        parameters: Mapping[str, Any],
        *,
        more: bool = False,
        passed: socket.socket | None = None,
    ) -> VarlinkStream:
        """Send a call together with the descriptor of `passed`. Raises VarlinkFailure."""
        call = {"method": f"org.qkilld1.{method}", "parameters": parameters}
        data = json.dumps(call | {"more": True} if more else call).encode() + b"\0"
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] not in (0, os.geteuid()):
                raise PermissionError(0, "served by another user")
            if passed is not None:
                data = data[socket.send_fds(sock, [data], [passed.fileno()]) :]
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_REPLY)
        except OSError as error:
            sock.close()
            raise VarlinkFailure(f"{path}: {error.strerror}") from None
        writer.write(data)
        return cls(reader, writer)

    async def next(self) -> dict[str, Any] | None:
        """Return the parameters of the next reply; None after the last one.

        Raises VarlinkFailure if the call is refused or the daemon exits.
        """
        if self._over:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = json.loads((await self._reader.readuntil(b"\0"))[:-1])
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            raise VarlinkFailure(f"no reply: {error!r}") from None
        if name := reply.get("error"):
            raise VarlinkFailure(str(name))
        self._timeout_s, self._over = None, not reply.get("continues")
        parameters: dict[str, Any] = reply.get("parameters") or {}
        return parameters

    def close(self) -> None:
        self._writer.close()


def _discard(work: asyncio.Future[socket.socket | None]) -> None:
    if not work.cancelled() and work.exception() is None and (late := work.result()):
        late.close()
