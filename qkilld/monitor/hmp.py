"""A client for the human monitor: lines of text, and a prompt after each reply.

Most handwritten units use this monitor, which has no out-of-band commands and no events. Before the
output, QEMU's line editor echoes each character of the line, with escape sequences.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Final, Self

from qkilld.model.errors import (
    CommandRefused,
    MonitorBusy,
    MonitorProtocolError,
    MonitorTimeout,
)
from qkilld.model.text import printable
from qkilld.monitor.channel import MAX_MESSAGE, TOO_LONG, Channel

OPEN_S: Final = 1.0
_PROMPT: Final = b"(qemu) "
_ESCAPES: Final = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]|\xff[\xfb-\xfe].", re.DOTALL)
"""Escape sequences of a terminal, and telnet commands (RFC 854) from "telnet:" monitors."""
_REFUSAL: Final = re.compile(r"unknown command: '|Error: |[^\n]*\nTry \"help ")


def checked(line: str, text: str) -> str:
    """Return the human monitor's output for a line, with plain line breaks.

    Raises CommandRefused if the output looks like an error, because the monitor reports errors only
    as text.
    """
    text = text.replace("\r\n", "\n")
    if _REFUSAL.match(text):
        raise CommandRefused(line, "", printable(text.partition("\n")[0]))
    return text


class HmpClient(Channel):
    def __init__(self) -> None:
        super().__init__()
        self._buffer = bytearray()
        self._answer: asyncio.Future[bytes] = self._future()

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        *,
        timeout_s: float = OPEN_S,
        is_starved: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Take over a connected socket, and wait for the prompt. `is_starved`: see Channel.

        If this fails, closes the socket and raises MonitorError (MonitorBusy if no prompt comes in
        time).
        """
        client = await cls._over(connection)
        client.is_starved = is_starved
        try:
            until = client._loop.time() + timeout_s
            banner: bytes = await client._wait(client._answer, until, "the prompt")
            if not banner.startswith(b"QEMU "):
                raise MonitorProtocolError("The socket is not a human monitor")
        except MonitorTimeout:
            client.close()
            raise MonitorBusy(
                "The monitor is silent: it serves another program, or QEMU is busy"
            ) from None
        except BaseException:
            client.close()
            raise
        return client

    async def hmp(self, line: str, *, timeout_s: float) -> str:
        """Run a line; return its output. Callers must run only one line at a time.

        Raises CommandRefused if the output looks like an error. On any other MonitorError, the
        connection is closed, because a late reply would be taken for the reply to the next line.
        """
        assert self._answer.done(), "one command at a time"
        assert line.isprintable()
        try:
            self._answer = self._future()
            self._send(line.encode() + b"\n")
            until = self._loop.time() + timeout_s
            printed: bytes = await self._wait(self._answer, until, line)
        except BaseException:
            self.close()
            raise
        return checked(line, printed.partition(b"\n")[2].decode(errors="replace"))

    def _feed(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_MESSAGE:
            raise MonitorProtocolError(TOO_LONG)
        if not self._buffer.endswith(_PROMPT):
            return
        if self._answer.done():  # No call waits for this output.
            self._buffer.clear()
            return
        printed = _ESCAPES.sub(b"", bytes(self._buffer))
        self._buffer.clear()
        self._answer.set_result(printed.removesuffix(_PROMPT))
