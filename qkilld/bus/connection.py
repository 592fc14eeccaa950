"""One connection to a message bus: dbus_next with its known faults cured.

The cures, each for dbus_next 0.2.3:

- a full socket buffer while it writes ends the connection: `_Writer`;
- the end of the connection during authentication spins for ever: `_auth_readline`;
- a message that it cannot parse ends the connection, a flood of them starves every timer of the
  loop, and one of 100 MiB is parsed in one go: `_message_reader`;
- `call()` has no timeout and hands errors back as messages: `request`;
- `disconnect()` leaves the socket open, and so does a failure to connect: `close`,
  `_setup_socket`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from typing import Any, Final

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio.message_bus import MessageBus, _MessageWriter
from dbus_next.constants import BusType, MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_next.errors import AuthError, InvalidAddressError
from dbus_next.message import Message

from qkilld.bus.framing import Frames
from qkilld.model.errors import BY_BUS_NAME, BusError, Failed
from qkilld.model.words import BUS_NAME

CONNECT_TIMEOUT_S: Final = 10.0
CALL_TIMEOUT_S: Final = 25.0
"""The same as libdbus and sd-bus have for a method call."""
READ_BYTES: Final = 16 * 1024
"""So much is read before the loop gets to look at its timers and pidfds again: ~100 small calls."""

_log = logging.getLogger(__name__)
_DBUS: Final = "org.freedesktop.DBus"


class _Writer(_MessageWriter):
    """Without file descriptors, which nobody here sends."""

    def write_callback(self) -> None:
        try:
            while self.buf is not None or self.messages.qsize():
                if self.buf is None:
                    data, _, self.fut = self.messages.get_nowait()
                    self.buf, self.offset = memoryview(data), 0
                self.offset += self.sock.send(self.buf[self.offset :])
                if self.offset >= len(self.buf):
                    self.buf = None
                    if self.fut is not None and not self.fut.done():
                        self.fut.set_result(None)
            self.loop.remove_writer(self.fd)
        except (BlockingIOError, InterruptedError):
            return  # the loop calls again when there is room
        except OSError as error:
            self.bus._finalize(error)


class Connection(MessageBus):
    """Use `connect()` below to make one; it must be made inside a running loop."""

    def __init__(self, address: str | None, bus_type: BusType) -> None:
        super().__init__(address, bus_type)  # type: ignore[arg-type]  # None is its default
        self._writer = _Writer(self)
        self._frames = Frames()

    def _setup_socket(self) -> None:
        try:
            super()._setup_socket()
        except BaseException:
            # It is left open where it could not be connected, or not be made non-blocking.
            if hasattr(self, "_sock"):
                self._stream.close()
                self._sock.close()
            raise

    async def _auth_readline(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            chunk = await self._loop.sock_recv(self._sock, 1)
            if not chunk:
                raise EOFError("the bus closed the connection during authentication")
            line += chunk
        return line[:-2].decode()

    def _message_reader(self) -> None:
        try:
            chunk = self._sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._finalize(error)
            return
        if not chunk:
            self._finalize(EOFError("the bus closed the connection"))
            return
        for raw in self._frames.feed(chunk):
            self._received(raw)

    def _received(self, raw: bytes) -> None:
        try:
            message = Unmarshaller(io.BytesIO(raw)).unmarshall()
        except Exception:
            # The bus has checked it, dbus_next does not know it: a future header field, say.
            _log.warning("left out a message that cannot be read (%d bytes)", len(raw))
            return
        self._on_message(message)

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
    ) -> list[Any]:
        """Call a method and return the body of its reply.

        Raises the QkilldError that the reply names, Failed for any other error reply, BusError
        where the connection is lost or no reply comes within `timeout_s`.
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
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self.call(message)
        except TimeoutError:
            raise BusError(
                f"no reply from {destination} to {member} within {timeout_s:g} s"
            ) from None
        except (OSError, EOFError) as error:
            raise BusError("the connection to the bus is lost") from error
        if reply is None:
            raise BusError("the connection to the bus is lost")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise remote_error(destination, reply.error_name, text)
        return list(reply.body)

    async def request_bus(self, member: str, signature: str = "", *body: Any) -> list[Any]:
        """Call a method of the bus driver itself."""
        return await self.request(
            _DBUS, "/org/freedesktop/DBus", _DBUS, member, signature, list(body)
        )

    def tell_bus(self, member: str, signature: str, *body: Any) -> None:
        """Call a method of the bus driver and want no reply."""
        self.tell(_DBUS, "/org/freedesktop/DBus", _DBUS, member, signature, *body)

    def tell(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        *body: Any,
    ) -> None:
        """Call a method and want no reply."""
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
        """The uid of the process that owns a bus name. Raises BusError where nobody does."""
        (uid,) = await self.request_bus("GetConnectionUnixUser", "s", name)
        return int(uid)

    async def machine_id(self) -> list[str]:
        """As org.freedesktop.DBus.Peer.GetMachineId gives it."""
        return await self.request(
            _DBUS, "/org/freedesktop/DBus", "org.freedesktop.DBus.Peer", "GetMachineId"
        )

    async def own(self, name: str) -> bool:
        """Take a bus name; False where somebody has it already."""
        reply = await self.request_name(name, NameFlag.DO_NOT_QUEUE)
        return reply in (RequestNameReply.PRIMARY_OWNER, RequestNameReply.ALREADY_OWNER)

    async def disown(self, name: str) -> None:
        """Give a bus name up. Calls that came for it have come in when this returns."""
        await self.request_bus("ReleaseName", "s", name)

    async def wait_closed(self) -> None:
        """Return when the connection has ended, however it did."""
        with contextlib.suppress(Exception):
            await self.wait_for_disconnect()

    async def flush(self) -> None:
        """Return when what was sent before has been written, or the connection is gone."""
        with contextlib.suppress(Exception):
            await self.request_bus("GetId")

    def close(self) -> None:
        if not self._disconnected:
            self._user_disconnect = True
            self._finalize(None)
        self._stream.close()
        self._sock.close()


class CallFailed(Failed):
    """Somebody else's error; `name` is the D-Bus name of it."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text or 'no reason given'} ({name})")
        self.name = name


def remote_error(destination: str, name: str, text: str) -> Exception:
    """The exception for an error reply."""
    if cls := BY_BUS_NAME.get(name):
        return cls(text)
    who = "qkilld" if destination == BUS_NAME else destination
    match name:
        case (
            "org.freedesktop.DBus.Error.ServiceUnknown"
            | "org.freedesktop.DBus.Error.NameHasNoOwner"
        ):
            return BusError(f"{who} is not running on this bus, and the bus cannot start it")
        case "org.freedesktop.DBus.Error.NoReply" | "org.freedesktop.DBus.Error.Disconnected":
            return BusError(f"{who} went away before it answered")
    return CallFailed(name, text)


async def connect(
    address: str | None = None, *, user: bool = False, timeout_s: float = CONNECT_TIMEOUT_S
) -> Connection:
    """Connect to the system bus, the session bus (`user`) or the bus at `address`.

    Raises BusError, which names the bus.
    """
    which = f"bus at {address}" if address else "session bus" if user else "system bus"
    connection = None
    try:
        async with asyncio.timeout(timeout_s):
            connection = Connection(address, BusType.SESSION if user else BusType.SYSTEM)
            await connection.connect()
    except (OSError, EOFError, AuthError, InvalidAddressError, ValueError, TimeoutError) as error:
        if connection is not None:
            connection.close()
        reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise BusError(f"cannot connect to the {which}: {reason}") from error
    return connection
