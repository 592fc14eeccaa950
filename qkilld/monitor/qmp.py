"""A client for QMP: greeting, in-band commands one at a time, out-of-band commands, events.

Source: QEMU's docs/interop/qmp-spec. While QEMU hangs in its final drain, it answers an out-of-band
command in 1 to 3 ms if the connection was made before the drain. But QEMU answers no out-of-band
command if 8 in-band commands wait behind a blocked one (measured, QEMU 7.2 and 10.0). So only one
in-band command is sent at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

from qkilld.model.dataclass import dataclass
from qkilld.model.errors import (
    CommandRefused,
    CommandUnsent,
    MonitorBusy,
    MonitorError,
    MonitorProtocolError,
    MonitorTimeout,
)
from qkilld.model.text import printable
from qkilld.monitor.channel import MAX_MESSAGE, TOO_LONG, Channel, Lines, decode_object
from qkilld.monitor.hmp import checked

OPEN_S: Final = 1.0
"""Timeout of greeting and negotiation, which usually take 2 ms. A monitor that sends no greeting in
time counts as busy: while it serves a client, it greets no other client."""


@dataclass(frozen=True, slots=True)
class QmpEvent:
    name: str
    data: Mapping[str, Any]
    """The data as received. It was not checked."""
    received: int
    """When the event was received (µs, CLOCK_MONOTONIC)."""


class QmpClient(Channel):
    """`oob`: whether out-of-band commands were negotiated."""

    def __init__(self, on_event: Callable[[QmpEvent], None] | None = None) -> None:
        super().__init__()
        self.oob = False
        self._adopted = False
        """The connection was adopted, and no line has been received since then."""
        self._on_event = on_event
        self._lines = Lines()
        self._pretty: list[bytes] = []
        self._pretty_size = 0
        self._greeting: asyncio.Future[dict[str, Any]] = self._future()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._in_band = 0
        """The id of the unanswered in-band command, 0 if there is none."""
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        on_event: Callable[[QmpEvent], None] | None = None,
        *,
        timeout_s: float = OPEN_S,
        is_starved: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Take over a connected socket, and negotiate. `is_starved`: see Channel.

        If this fails, closes the socket and raises MonitorError (MonitorBusy if no greeting comes
        in time).
        """
        client = await cls._over(connection, on_event)
        client.is_starved = is_starved
        try:
            await client._negotiate(timeout_s)
        except BaseException:
            client.close()
            raise
        return client

    @classmethod
    async def adopt(
        cls, connection: socket.socket, on_event: Callable[[QmpEvent], None] | None = None
    ) -> Self:
        """Take over a connection on which another process has negotiated out-of-band commands.

        The other process may have read half a message, so an incomplete first message is ignored.
        Replies to commands of that process are ignored, too.
        """
        client = await cls._over(connection, on_event)
        client._greeting.cancel()
        client._adopted = client.oob = True
        client._last_id = (int.from_bytes(os.urandom(4)) >> 1) << 20
        return client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        pass_fd: int | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run a command; return its result. Waits until the previous command has its reply.

        `pass_fd`: a descriptor to pass to QEMU, for getfd. `on_sent` is called when the command has
        been sent. From then on, QEMU may execute it even if no reply comes. Raises CommandUnsent,
        MonitorTimeout, CommandRefused or another MonitorError.
        """
        until = self._loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(until):
                while self._in_band and not self.closed:
                    await self._idle.wait()
        except TimeoutError:
            raise CommandUnsent(
                f"{command} was not sent: the monitor has not answered the previous command"
            ) from None
        number = self._in_band = self._last_id + 1
        self._idle.clear()
        return await self._call("execute", command, arguments, number, until, pass_fd, on_sent)

    async def send(self, command: str, *, timeout_s: float) -> None:
        """Run a command. A late or lost reply is not an error, because QEMU may still execute the
        command. Raises CommandRefused if QEMU refuses, and another MonitorError if the command was
        not sent."""
        sent = asyncio.Event()
        try:
            await self.execute(command, timeout_s=timeout_s, on_sent=sent.set)
        except MonitorError as error:
            if isinstance(error, CommandRefused) or not sent.is_set():
                raise

    async def execute_oob(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """Run a command ahead of all in-band commands; return its result.

        If `oob` is false, raises CommandRefused. Otherwise, raises what `execute` raises.
        """
        if not self.oob:
            raise CommandRefused(command, "Unsupported", "this QEMU has no out-of-band commands")
        until = self._loop.time() + timeout_s
        return await self._call("exec-oob", command, arguments, self._last_id + 1, until)

    async def hmp(self, line: str, *, timeout_s: float) -> str:
        """Run a line in the human monitor; return its output. Raises what `execute` raises."""
        printed = await self.execute(
            "human-monitor-command", {"command-line": line}, timeout_s=timeout_s
        )
        if not isinstance(printed, str):
            raise MonitorProtocolError("The output of the human monitor is not text")
        return checked(line, printed)

    async def _negotiate(self, timeout_s: float) -> None:
        until = self._loop.time() + timeout_s
        try:
            greeting = await self._wait(self._greeting, until, "the greeting")
        except MonitorTimeout:
            raise MonitorBusy(
                "The monitor is silent: it serves another program, or QEMU is busy"
            ) from None
        qmp = greeting["QMP"]
        if not isinstance(qmp, dict):
            raise MonitorProtocolError("The greeting is not that of QMP")
        offered = qmp.get("capabilities")
        oob = isinstance(offered, list) and "oob" in offered
        number = self._in_band = self._last_id + 1
        self._idle.clear()
        arguments = {"enable": ["oob"]} if oob else None
        # After a late greeting, this command would have little time left.
        until = max(until, self._loop.time() + timeout_s / 2)
        await self._call("execute", "qmp_capabilities", arguments, number, until)
        self.oob = oob

    async def _call(
        self,
        how: str,
        command: str,
        arguments: Mapping[str, Any] | None,
        number: int,
        until: float,
        pass_fd: int | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> Any:
        request: dict[str, Any] = {how: command, "id": number}
        if arguments is not None:
            request["arguments"] = arguments
        answer = self._future()
        self._last_id = number
        self._answers[number] = answer
        try:
            self._send(json.dumps(request).encode() + b"\r\n", pass_fd)
            if not self._is_closing:
                on_sent()
            message = await self._wait(answer, until, command)
        finally:
            self._answers.pop(number, None)
        if "return" in message:
            return message["return"]
        raise _refusal(command, message["error"])

    def _fail(self, error: MonitorError) -> None:
        super()._fail(error)
        self._idle.set()

    def _feed(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if self._pretty or line == b"{":
                self._collect(line)
            else:
                self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        adopted, self._adopted = self._adopted, False
        try:
            message = decode_object(line)
        except MonitorProtocolError:
            if adopted:
                return
            raise
        self._take(message)

    def _collect(self, line: bytes) -> None:
        """Join the lines of a message of -qmp-pretty. The last line of a message is a single
        brace."""
        self._pretty.append(line)
        self._pretty_size += len(line) + 1
        if self._pretty_size > MAX_MESSAGE:
            raise MonitorProtocolError(TOO_LONG)
        if line == b"}":
            message = b"\n".join(self._pretty)
            self._pretty, self._pretty_size = [], 0
            self._take(decode_object(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._take_event(message)
        elif "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message)
        elif "return" in message or "error" in message:
            number = message.get("id")
            if number is None and "error" in message:
                number = self._in_band  # QEMU could not parse the command.
            if not isinstance(number, int):
                return
            if number == self._in_band:
                self._in_band = 0
                self._idle.set()
            answer = self._answers.get(number)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            raise MonitorProtocolError("A message is neither an event nor a reply")

    def _take_event(self, message: dict[str, Any]) -> None:
        name, data = message["event"], message.get("data", {})
        if not isinstance(name, str) or not isinstance(data, dict):
            raise MonitorProtocolError("An event has no name, or invalid data")
        if self._on_event is not None:
            self._on_event(QmpEvent(printable(name), data, time.monotonic_ns() // 1000))


def _refusal(command: str, error: object) -> CommandRefused:
    match error:
        case {"class": str(name), "desc": str(text)}:
            return CommandRefused(command, printable(name), printable(text))
    return CommandRefused(command, "", "no reason was given")
