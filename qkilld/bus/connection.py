"""One connection to a message bus. A D-Bus library (bus.library) encodes messages; this package
parses them.

The libraries would parse everything that a stranger sends, keep every signature that they have ever
parsed, and accept unsolicited replies and signals. So this module checks the header first
(bus.framing): a reply must answer an open call, and a signal must have a subscriber. Only then is
the body parsed (bus.values).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from qkilld.bus.framing import (
    Frames,
    IncomingMessage,
    MessageKind,
    error_reply,
    reply_header,
    signal_header,
)
from qkilld.bus.library import (
    AuthError,
    InvalidAddressError,
    Message,
    MessageFlag,
    NameFlag,
    RequestNameReply,
    encode,
    encode_body,
)
from qkilld.bus.transport import open_socket
from qkilld.bus.values import parse
from qkilld.model.bus_address import SYSTEM_BUS, BusAddress
from qkilld.model.constants import BUS_NAME
from qkilld.model.errors import (
    BY_BUS_NAME,
    AccessDenied,
    BusError,
    Failed,
    QkilldError,
    RefusedByBus,
)
from qkilld.model.text import printable

CONNECT_TIMEOUT_S: Final = 10.0
SSH_TIMEOUT_S: Final = 150.0
"""Longer than CONNECT_TIMEOUT_S, because ssh may ask for a password."""
CALL_TIMEOUT_S: Final = 25.0
"""The default of libdbus and sd-bus for a method call."""
READ_BYTES: Final = 64 * 1024
"""The maximum number of bytes that one recv() reads."""
READS: Final = 4
"""How many recv() calls to make before the loop serves its timers and pidfds. Four calls read up to
2,000 small messages in 10 ms. The bus has a single queue for all senders, so a sender that fills it
blocks the others; a single recv() would not empty it fast enough."""
HELD_BACK_S: Final = 0.25
"""How long the refusals of a flood of calls are collected before they are sent together. Otherwise,
each refusal would cost two context switches, and a client that waits for each answer would send
faster."""
MAX_HELD_BACK: Final = 128 * 1024
"""Delayed refusals are sent at once when they have more bytes than this."""
MAX_UNSENT: Final = 512 * 1024
"""Nothing is read while more bytes than this wait to be sent, so that unsent replies cannot fill
the memory."""

_log = logging.getLogger(__name__)
_DBUS: Final = "org.freedesktop.DBus"
_DBUS_PATH: Final = "/org/freedesktop/DBus"

_Subscription = tuple[str, str, str, str]
"""Sender, path, interface and member of a signal."""


class Connection:
    """Created by `connect()` in a running loop."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over `sock`, which is connected and authenticated."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._serial = 0
        self._frames = Frames()
        self._paused = False
        """Whether reading has stopped because too much waits to be sent."""
        self._unsent = bytearray()
        self._scheduled = False
        self._blocked = False
        """Whether the socket's buffer is full."""
        self._has_room = asyncio.Event()
        """Set when everything is sent, or the connection is lost."""
        self._open_calls: dict[int, tuple[str, asyncio.Future[IncomingMessage]]] = {}
        """Calls without a reply yet, by serial: the destination, and the future for the reply."""
        self._handlers: dict[_Subscription, list[tuple[str, Callable[[list[Any]], None]]]] = {}
        """The signature and the callback of each subscription."""
        self.on_call: Callable[[IncomingMessage], None] = self._refuse
        """Called with each method call."""
        self._held_back = bytearray()
        """Delayed refusals."""
        self.is_remote = False
        """Whether the bus is on another host or in a container."""
        self.clock_offset = 0
        """How far CLOCK_MONOTONIC of the bus's host is ahead of ours, µs."""
        self.uid = os.geteuid()
        """The uid under which the bus knows us."""
        self._loop.add_reader(sock, self._on_readable)

    @property
    def connected(self) -> bool:
        return not self._end.done()

    def _lost(self, error: Exception | None) -> None:
        """End the connection; `error` is the reason, None if we close it."""
        if self._end.done():
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._has_room.set()
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # Avoid asyncio's warning if nobody awaits it.
        for _, future in self._open_calls.values():
            if not future.done():
                future.set_exception(error or EOFError("the connection is closed"))
                future.exception()  # Avoid the same warning.

    # ---- sending ----

    def send(self, message: Message) -> None:
        """Send a message in the next turn of the loop. File descriptors are not supported."""
        self._queue(message)
        self._schedule_write()

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Send a signal in the next turn of the loop. Does nothing if the connection is lost."""
        if self.connected:
            encoded = encode_body(signature, body)
            serial, length = self._next_serial(), len(encoded)
            self._unsent += signal_header(path, interface, member, serial, signature, length)
            self._unsent += encoded
            self._schedule_write()

    def reply(self, call: IncomingMessage, signature: str, body: bytearray) -> None:
        """Write all queued messages and then the reply to a call, as soon as the socket has room.
        Does nothing if the connection is lost. `body` must already be encoded
        (library.encode_body)."""
        if self.connected:
            self._unsent += reply_header(call, self._next_serial(), signature, len(body))
            self._unsent += body
            if not self._blocked:
                self._write()

    @property
    def has_room(self) -> bool:
        """Whether at most MAX_UNSENT bytes wait to be sent, or the connection is lost."""
        return not self.connected or len(self._unsent) <= MAX_UNSENT

    async def wait_for_room(self) -> None:
        """Wait until `has_room` is true."""
        while not self.has_room:
            self._has_room.clear()
            await self._has_room.wait()

    def _queue(self, message: Message) -> int:
        """Append a message to the queue; return its serial."""
        message.serial = serial = self._next_serial()
        self._unsent += encode(message)
        return serial

    def _send_with(self, message: Message) -> int:
        """Begin to send a message; its descriptors go with the first byte. Return the serial.
        Raises BusError if the socket is full or lost."""
        message.serial = serial = self._next_serial()
        data = bytes(encode(message))
        self._write()
        try:
            if self._unsent:
                raise BlockingIOError
            sent = socket.send_fds(self._sock, [data], message.unix_fds)
        except OSError as error:
            raise BusError("failed to send a descriptor to the bus") from error
        self._unsent += data[sent:]
        return serial

    def _next_serial(self) -> int:
        # Serials have 32 bits and are never 0.
        self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    def _schedule_write(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        """Write everything queued; if the socket is full, continue when the loop reports it
        writable."""
        if not self.connected:
            return
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            self._blocked = True
            self._loop.add_writer(self._sock, self._write)
            return
        except OSError as error:
            self._lost(error)
            return
        self._scheduled = False
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._sock)
        self._has_room.set()
        self._go_on_reading()

    # ---- reading ----

    def _on_readable(self) -> None:
        if len(self._unsent) > MAX_UNSENT:
            self._paused = True
            self._loop.remove_reader(self._sock)
            return
        for _ in range(READS):
            if not self._read():
                return

    def _read(self) -> bool:
        """Return whether there may be more to read."""
        try:
            chunk = self._sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lost(error)
            return False
        if not chunk:
            self._lost(EOFError("the bus closed the connection"))
            return False
        for message in self._frames.feed(chunk):
            if message is None:
                # Skip only this message. The bus has accepted the message, so its header probably
                # follows a newer specification.
                _log.debug("ignored a message whose header cannot be parsed")
                continue
            try:
                self._received(message)
            except Exception:
                _log.exception("failed to handle a message")
        return len(chunk) == READ_BYTES and self.connected

    def _go_on_reading(self) -> None:
        if self._paused and self.connected:
            self._paused = False
            self._loop.add_reader(self._sock, self._on_readable)

    def _received(self, message: IncomingMessage) -> None:
        match message.kind:
            case MessageKind.CALL:
                self.on_call(message)
            case MessageKind.REPLY | MessageKind.ERROR:
                self._replied(message)
            case MessageKind.SIGNAL:
                self._signalled(message)

    def _replied(self, message: IncomingMessage) -> None:
        destination, future = self._open_calls.get(message.reply_serial, ("", None))
        if future is None or future.done():
            _log.debug("ignored a reply that answers no open call")
            return
        # Accept a reply only from the callee, or from the bus, which may answer any call with an
        # error. The owner of a well-known name is not known here, but the bus lets only this owner
        # reply (send_requested_reply in its policy).
        if message.sender != _DBUS and (
            destination == _DBUS or (destination.startswith(":") and message.sender != destination)
        ):
            _log.debug("ignored a reply from a connection that was not called")
            return
        future.set_result(message)

    def _signalled(self, message: IncomingMessage) -> None:
        key = (message.sender, message.path, message.interface, message.member)
        for signature, handler in tuple(self._handlers.get(key, ())):
            if message.signature == signature and message.body is not None:
                handler(parse(signature, message.body, message.order))

    def _refuse(self, call: IncomingMessage) -> None:
        self.refuse(call, "org.freedesktop.DBus.Error.UnknownObject", "Nothing is served here")

    def refuse(self, call: IncomingMessage, name: str, text: str) -> None:
        """Answer with an error, at almost no cost."""
        if call.wants_reply and self.connected:
            self._unsent += error_reply(call, self._next_serial(), name, text)
            self._schedule_write()

    def refuse_later(self, call: IncomingMessage, name: str, text: str) -> None:
        """Refuse one of a flood of calls. The error is sent up to HELD_BACK_S later."""
        if not call.wants_reply:
            return
        if not self._held_back:
            self._loop.call_later(HELD_BACK_S, self.send_held_back)
        self._held_back += error_reply(call, self._next_serial(), name, text)
        if len(self._held_back) > MAX_HELD_BACK:
            self.send_held_back()

    def send_held_back(self) -> None:
        if self._held_back and self.connected:
            self._unsent += self._held_back
            self._schedule_write()
        self._held_back.clear()

    def subscribe(
        self,
        sender: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        handler: Callable[[list[Any]], None],
    ) -> Callable[[], None]:
        """Call `handler` with the body of each signal that matches all other arguments. Return a
        function that unsubscribes. The caller must add the match rule to the bus."""
        key = (sender, path, interface, member)
        entry = (signature, handler)
        self._handlers.setdefault(key, []).append(entry)

        def unsubscribe() -> None:
            self._handlers[key].remove(entry)
            if not self._handlers[key]:
                del self._handlers[key]

        return unsubscribe

    def watch_names(self, handler: Callable[[list[Any]], None]) -> Callable[[], None]:
        """Subscribe to NameOwnerChanged of the bus: `handler` gets name, old owner, new owner."""
        return self.subscribe(_DBUS, _DBUS_PATH, _DBUS, "NameOwnerChanged", "sss", handler)

    async def request(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: list[Any] | None = None,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        interactive: bool = False,
        gives: str | None = None,
        descriptor: int | None = None,
    ) -> list[Any]:
        """Call a method and return the body of its reply. `gives`: the signature that the reply
        must have. `descriptor` is sent with the call, as index 0; this needs
        `connect(descriptors=True)`.

        Raises the QkilldError that an error reply names; RefusedByBus if the policy of the bus
        forbids the call; CallFailed for any other error reply. Raises BusError if the callee or the
        connection is missing or lost, if no reply comes within `timeout_s`, or if the reply cannot
        be parsed.
        """
        if not self.connected:
            raise BusError("the connection to the bus is lost")
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body or [],
        )
        if interactive:
            message.flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        if descriptor is not None:
            message.unix_fds = [descriptor]
        future: asyncio.Future[IncomingMessage] = self._loop.create_future()
        serial = self._queue(message) if descriptor is None else self._send_with(message)
        self._open_calls[serial] = (destination, future)
        try:
            self._schedule_write()
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            raise BusError(
                f"no reply from {destination} to {member} within {timeout_s:g} s"
            ) from None
        except (OSError, EOFError) as error:
            raise BusError("the connection to the bus is lost") from error
        finally:
            del self._open_calls[serial]
        if reply.kind == MessageKind.ERROR:
            if reply.sender == _DBUS and reply.error_name == AccessDenied.bus_name:
                raise RefusedByBus(f"the policy of the bus does not allow a call of {destination}")
            raise remote_error(destination, reply.error_name, _error_text(reply))
        try:
            return _body(reply, gives)
        except ValueError as error:
            raise BusError(
                f"the reply from {destination} to {member} is unusable: {error}"
            ) from None

    async def request_bus(self, member: str, signature: str = "", *body: Any) -> list[Any]:
        """Call a method of the bus driver."""
        return await self.request(
            _DBUS, _DBUS_PATH, _DBUS, member, signature, list(body), gives=_DRIVER_GIVES[member]
        )

    def tell_bus(self, member: str, signature: str, *body: Any) -> None:
        """Call a method of the bus driver without asking for a reply."""
        self.tell(_DBUS, _DBUS_PATH, _DBUS, member, signature, *body)

    def tell(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        *body: Any,
    ) -> None:
        """Call a method without asking for a reply."""
        if self.connected:
            self.send(
                Message(
                    destination=destination,
                    path=path,
                    interface=interface,
                    member=member,
                    signature=signature,
                    body=list(body),
                    flags=MessageFlag.NO_REPLY_EXPECTED | MessageFlag.NO_AUTOSTART,
                )
            )

    async def uid_of(self, name: str) -> int:
        """Return the uid of a bus name's owner. Raises BusError if there is no owner."""
        (uid,) = await self.request_bus("GetConnectionUnixUser", "s", name)
        return int(uid)

    async def machine_id(self) -> list[str]:
        """Call org.freedesktop.DBus.Peer.GetMachineId of the bus."""
        return await self.request(
            _DBUS, _DBUS_PATH, "org.freedesktop.DBus.Peer", "GetMachineId", gives="s"
        )

    async def own(self, name: str) -> bool:
        """Request a bus name; return False if it has another owner. Raises RefusedByBus,
        BusError."""
        flags = NameFlag.DO_NOT_QUEUE.value
        (reply,) = await self.request_bus("RequestName", "su", name, flags)
        return reply in (
            RequestNameReply.PRIMARY_OWNER.value,
            RequestNameReply.ALREADY_OWNER.value,
        )

    async def disown(self, name: str) -> None:
        """Release a bus name. When this returns, all calls that were sent to the name have been
        received."""
        await self.request_bus("ReleaseName", "s", name)

    async def wait_closed(self) -> None:
        """Wait for the end of the connection."""
        with contextlib.suppress(Exception):
            await asyncio.shield(self._end)

    async def flush(self) -> None:
        """Wait until everything queued so far has been written, the connection is lost, or
        CALL_TIMEOUT_S has passed."""
        with contextlib.suppress(Exception):
            await self.request_bus("GetId")

    def close(self) -> None:
        self._lost(None)
        self._sock.close()


_DRIVER_GIVES: Final = {
    "AddMatch": "",
    "GetConnectionUnixUser": "u",
    "GetId": "s",
    "GetNameOwner": "s",
    "Hello": "s",
    "NameHasOwner": "b",
    "ReleaseName": "u",
    "RequestName": "u",
}


def _body(reply: IncomingMessage, gives: str | None) -> list[Any]:
    """Parse the body of a reply. Raises ValueError."""
    if gives is not None and reply.signature != gives:
        raise ValueError(f"it is of the type ({printable(reply.signature)}), not ({gives})")
    if reply.body is None:
        raise ValueError("it is too long")
    return parse(reply.signature, reply.body, reply.order)


def _error_text(reply: IncomingMessage) -> str:
    """Return the message of an error reply; "" if it has none that can be parsed."""
    if not reply.signature.startswith("s"):
        return ""
    try:
        return str(_body(reply, None)[0])
    except ValueError:
        return ""


class CallFailed(Failed):
    """An error reply that is not one of ours; `name` is its D-Bus name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text or 'no reason given'} ({name})")
        self.name = name


def remote_error(destination: str, name: str, text: str) -> Exception:
    """Make the exception for an error reply."""
    if cls := BY_BUS_NAME.get(name):
        return cls(text)
    service = "qkilld" if destination == BUS_NAME else destination
    match name:
        case (
            "org.freedesktop.DBus.Error.ServiceUnknown"
            | "org.freedesktop.DBus.Error.NameHasNoOwner"
        ):
            return BusError(f"{service} is not running on this bus, and the bus cannot start it")
        case "org.freedesktop.DBus.Error.NoReply" | "org.freedesktop.DBus.Error.Disconnected":
            return BusError(f"{service} went away before it answered")
    return CallFailed(name, text)


_NO_CONNECTION: Final = (OSError, EOFError, ValueError, AuthError, InvalidAddressError, QkilldError)


async def connect(
    bus: BusAddress = SYSTEM_BUS,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    descriptors: bool = False,
) -> Connection:
    """Connect to a bus. `descriptors`: allow sending descriptors; received ones are closed.
    Raises BusError, which names the bus."""
    if bus.host:
        timeout_s = max(timeout_s, SSH_TIMEOUT_S)
    try:
        async with asyncio.timeout(timeout_s):
            sock = await open_socket(bus, descriptors=descriptors)
            return await _greeted(sock, bus.is_remote)
    except _NO_CONNECTION as error:
        raise BusError(f"cannot connect to the {bus.title}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Describe for people why there is no connection, without the number of an errno."""
    cause = error.__cause__ or error
    if isinstance(error, TimeoutError):
        return "no answer"
    return (isinstance(cause, OSError) and cause.strerror) or str(cause)


async def _greeted(sock: socket.socket, is_remote: bool) -> Connection:
    connection = Connection(sock)
    connection.is_remote = is_remote
    try:
        (name,) = await connection.request_bus("Hello")
        if is_remote:
            (connection.uid,) = await connection.request_bus("GetConnectionUnixUser", "s", name)
    except BaseException:
        connection.close()
        raise
    return connection
