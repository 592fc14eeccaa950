"""Refuse the calls that wait for a start that fails, because qkilld's configuration is wrong.

Without an answer, callers on D-Bus would wait 25 s for the timeout of the bus, which meanwhile
starts qkilld for no other call, even if the configuration has been corrected. A call on Varlink
would stay in the queue of the socket, even if its client has gone, and systemd would start qkilld
for it again and again, up to the start limit.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from typing import Final

from qkilld.adapters.service_manager import VARLINK, stored_descriptors
from qkilld.debug_log import ignore
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import BUS_NAME
from qkilld.model.errors import Failed, QkilldError
from qkilld.model.text import printable

VARLINK_FOR_S: Final = 0.5
"""The maximum time to answer calls on Varlink, because callers may connect again and again."""
BUS_FOR_S: Final = 5.0
MAX_TEXT: Final = 1024


def refuse_calls(why: str, bus: BusAddress) -> None:
    """Refuse the calls that have started this process; do nothing if systemd has not started it.

    Every user can read `why`.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        return
    text = printable(f"qkilld cannot start, because {why}", MAX_TEXT)
    if (fd := stored_descriptors().get(VARLINK)) is not None:
        with ignore("refusing calls on Varlink", OSError):
            _refuse_on_varlink(socket.socket(fileno=fd), text)
    with ignore("refusing calls on the bus", QkilldError, ImportError, TimeoutError):
        asyncio.run(_refuse_on_bus(bus, text))


def _refuse_on_varlink(listener: socket.socket, text: str) -> None:
    """Raises BlockingIOError when no call waits, OSError if no other can be accepted."""
    error = {"error": "org.qkilld1.Failed", "parameters": {"message": text}}
    reply = json.dumps(error).encode() + b"\0"
    listener.setblocking(False)
    until = time.monotonic() + VARLINK_FOR_S
    while time.monotonic() < until:
        client, _ = listener.accept()
        client.setblocking(False)
        with ignore("refusing a call on Varlink", OSError):
            client.send(reply)
            client.shutdown(socket.SHUT_WR)
        # Neither read nor close the socket, because both may block on a descriptor that the client
        # has sent (foreign_descriptors). The end of this process closes it.
        client.detach()


async def _refuse_on_bus(bus: BusAddress, text: str) -> None:
    from qkilld.bus.connection import connect

    async with asyncio.timeout(BUS_FOR_S):
        connection = await connect(bus)
        connection.on_call = lambda call: connection.refuse(call, Failed.bus_name, text)
        # The bus sends the calls that wait for our name before it replies.
        await connection.own(BUS_NAME)
        await connection.flush()
        # Let the end of this process close the connection. If it were closed earlier, a call could
        # wait in the bus: as long as this process runs, systemd does not start another one.
