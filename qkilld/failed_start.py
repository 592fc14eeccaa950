"""Refuse waiting calls if a wrong configuration prevents qkilld from starting.

Without an answer, callers on D-Bus would wait 25 s for the timeout of the bus. Meanwhile, the bus
would not start qkilld for any other call, even if the configuration had been corrected. A call on
Varlink would stay in the queue of the socket, even if its client had gone. systemd would start
qkilld for this call again and again, up to the start limit.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from typing import Final, NoReturn

from qkilld.adapters.service_manager import VARLINK, stored_descriptors
from qkilld.debug_log import ignore
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import BUS_NAME, ExitCode
from qkilld.model.errors import Failed, QkilldError
from qkilld.model.text import printable

VARLINK_FOR_S: Final = 0.5
"""How long this process refuses calls on Varlink. There is a limit, because callers may connect
again and again."""
BUS_FOR_S: Final = 5.0
MAX_TEXT: Final = 1024


def refuse_calls(why: str, bus: BusAddress) -> None:
    """Refuse the calls that have started this process, and end the process with exit code 2; do
    nothing if systemd has not started it.

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
    _end()


def _refuse_on_varlink(listener: socket.socket, text: str) -> None:
    """Refuse the next call on Varlink. Raises BlockingIOError when no call is left, OSError if a
    call cannot be accepted."""
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
        # Do not read from the socket, and do not close it: both may block if the client has sent a
        # descriptor (foreign_descriptors). The kernel closes the socket when this process ends.
        client.detach()


async def _refuse_on_bus(bus: BusAddress, text: str) -> NoReturn:
    from qkilld.bus.connection import connect

    async with asyncio.timeout(BUS_FOR_S):
        connection = await connect(bus)
        connection.on_call = lambda call: connection.refuse(call, Failed.bus_name, text)
        # The calls that wait for our name arrive before the bus confirms that we own it.
        await connection.own(BUS_NAME)
        await connection.flush()
        # Keep the connection open until this process ends: if this function returned, asyncio or
        # Python would close the connection earlier. If a call came after that, but before systemd
        # noticed the end of this process, the bus would ask systemd for a start again. systemd
        # would merge this request with the start that is failing, and the bus would get no answer.
        _end()


def _end() -> NoReturn:
    try:
        sys.stderr.flush()
    finally:
        os._exit(ExitCode.USAGE)
