"""One connection to a monitor or an agent. The other end is hostile.

A channel is closed by close(), by the other end, or because the other end sent invalid data. It
stays closed. Pending and later calls raise a MonitorError that says why it was closed. Whatever the
other end does, no other exception is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final, Self

from qkilld.foreign_descriptors import take_over
from qkilld.model.errors import MonitorClosed, MonitorError, MonitorProtocolError, MonitorTimeout
from qkilld.model.json_text import decode_json

MAX_MESSAGE: Final = 256 << 10
"""The maximum number of bytes of one message."""
MAX_FLOW: Final = 4 << 20
"""The maximum number of bytes accepted in FLOW_S. More bytes, such as a flood of events, would keep
the loop busy."""
FLOW_S: Final = 10.0
SHORT_S: Final = 2.0
STARVED_S: Final = 9.0
"""While the other end waits for the host's processors, timeouts of up to SHORT_S are extended by up
to this time."""
TOO_LONG: Final = f"The other end sent a message of more than {MAX_MESSAGE} bytes"


class Channel(asyncio.Protocol):
    """The base class of the clients. A client parses the received bytes in `_feed`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._error: MonitorError | None = None
        self.is_starved: Callable[[], bool] = lambda: False
        """Whether the other end has waited for the host's processors since this function was last
        called."""
        self._ended = False
        """The other end has closed the connection, and everything that it sent was read."""
        self._waiting: set[asyncio.Future[Any]] = set()
        self._flow = 0
        self._flow_since = self._loop.time()

    @classmethod
    async def _over(cls, connection: socket.socket, *arguments: Any) -> Self:
        """Return a client that takes over a connected stream socket."""
        try:
            connection = take_over(connection)
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: cls(*arguments), sock=connection
            )
        except BaseException:
            connection.close()
            raise
        return client

    @property
    def closed(self) -> bool:
        return self._error is not None

    def fileno(self) -> int:
        """Return the open socket's descriptor. If the channel is closed, raises the MonitorError
        with the reason."""
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        number: int = self._transport.get_extra_info("socket").fileno()
        return number

    def read_rest(self) -> bool:
        """Read, without blocking, what the other end sent before it exited.

        Return whether it is certain that everything was read. This is not certain if, for example,
        this side has closed the connection.
        """
        if self._error is not None:
            return self._ended
        with take_over(socket.socket(fileno=os.dup(self.fileno()))) as connection:
            while self._error is None:
                try:
                    data = connection.recv(MAX_MESSAGE)
                except OSError as error:
                    # ECONNRESET is a normal end, too, because QEMU exited before it had read
                    # everything.
                    return error.errno == errno.ECONNRESET
                if not data:
                    return True
                self.data_received(data)
        return False

    def close(self) -> None:
        """Close without waiting for the other end. May be called twice."""
        self._fail(MonitorClosed("The connection was closed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = self._error is None
        self._fail(MonitorClosed("The other end closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        now = self._loop.time()
        if now - self._flow_since >= FLOW_S:
            self._flow, self._flow_since = 0, now
        self._flow += len(data)
        try:
            if self._flow > MAX_FLOW:
                raise MonitorProtocolError(
                    f"The other end sent more than {MAX_FLOW} bytes in {FLOW_S:.0f} s"
                )
            self._feed(data)
        except MonitorError as error:
            self._fail(error)

    def _feed(self, data: bytes) -> None:
        """Parse received bytes. A MonitorError raised here closes the connection."""
        raise NotImplementedError

    def _send(self, data: bytes, pass_fd: int | None = None) -> None:
        """Send data, with the descriptor `pass_fd` if given. If the channel is closed, raises the
        MonitorError with the reason."""
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        if pass_fd is None:
            self._transport.write(data)
        else:
            self._send_with(data, pass_fd)

    @property
    def _is_closing(self) -> bool:
        """Whether the last data could not be sent, because the other end has closed the connection.
        `closed` becomes true only later."""
        return self._transport is None or self._transport.is_closing()

    def _send_with(self, data: bytes, fd: int) -> None:
        """Send on the socket itself, because asyncio's transport cannot pass descriptors. Raises
        MonitorError."""
        assert self._transport is not None
        count = 0
        if not self._transport.get_write_buffer_size():
            with (
                contextlib.suppress(OSError),
                take_over(socket.socket(fileno=os.dup(self.fileno()))) as connection,
            ):
                count = socket.send_fds(connection, [data], [fd])
        if count != len(data):
            self._fail(MonitorProtocolError("The monitor does not take a descriptor"))
            assert self._error is not None
            raise self._error

    def _future(self) -> asyncio.Future[Any]:
        """Return a future that fails when the channel is closed. If the channel is closed, raises
        the MonitorError with the reason."""
        if self._error is not None:
            raise self._error
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    async def _wait(self, future: asyncio.Future[Any], until: float, what: str) -> Any:
        """Await a future until `until` (the loop's clock), or longer if the other end is starved
        (see STARVED_S). If the future is not done by then, cancel it. Raises MonitorError."""
        now = self._loop.time()
        latest = until + STARVED_S if until - now <= SHORT_S else until
        try:
            while not future.done() and now < until:
                await asyncio.wait([future], timeout=until - now)
                now = self._loop.time()
                if not future.done() and until <= now < latest and self.is_starved():
                    until = min(now + SHORT_S / 2, latest)
            if not future.done():
                raise MonitorTimeout(f"No answer in time: {what}")
            return future.result()
        finally:
            future.cancel()

    def _fail(self, error: MonitorError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.abort()
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(error)


class Lines:
    """Splits a byte stream into lines. Buffers at most MAX_MESSAGE bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without line ends and empty lines.

        Raises MonitorProtocolError if a line is too long.
        """
        lines: list[bytes] = []
        if b"\n" in data:
            *lines, data = b"".join([*self._parts, data]).split(b"\n")
            self._parts, self._size = [], 0
        self._parts.append(data)
        self._size += len(data)
        if max(self._size, *map(len, lines), 0) > MAX_MESSAGE:
            raise MonitorProtocolError(TOO_LONG)
        return [line for line in (line.rstrip(b"\r") for line in lines) if line]


def decode_object(message: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises MonitorProtocolError if it is not one."""
    try:
        value = decode_json(message)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise MonitorProtocolError("A message is not a JSON object")
    return value
