"""Serve org.qkilld1 over Varlink.

A call waits for its user's turn (engine.turns). Calls over the bus wait for the same turns. Then
the call is checked against the interface description. A QkilldError is sent as the Varlink error of
the same name, but AccessDenied as PermissionDenied. BusError and all other exceptions are reported
as an internal error, with details only in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from qkilld import __version__
from qkilld.debug_log import note_once
from qkilld.engine.call_limits import Cost
from qkilld.engine.fair_shares import user_of
from qkilld.engine.turns import Turns
from qkilld.foreign_descriptors import close_later
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.errors import (
    AccessDenied,
    BusError,
    Busy,
    ConfigError,
    Failed,
    InvalidArgs,
    QkilldError,
)
from qkilld.model.json_text import decode_json
from qkilld.model.text import printable
from qkilld.varlink import idl
from qkilld.varlink.connection import InputBudget, VarlinkConnection, encode, encode_list
from qkilld.varlink.values import type_name

INTERFACE: Final = "org.qkilld1"
SERVICE_INTERFACE: Final = "org.varlink.service"
MAX_CONNECTIONS: Final = 512
"""The maximum number of connections of each user other than root."""
ACCEPT_AT_ONCE: Final = 16
RETRY_ACCEPT_S: Final = 0.2
ADVICE: Final = (
    "call the same method on D-Bus, where an administrator can be asked (`qkillctl` does)"
)

_SERVICE_TEXT: Final = """\
# The interface that every Varlink service has.
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(
  interface: string
) -> (
  description: string
)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied (message: ?string)

error ExpectedMore ()
"""
_DIRECTORIES: Final = (
    Path(__file__).parents[1] / "interfaces",  # Installed.
    Path(__file__).parents[2] / "dbus",  # In a checkout.
)


@functools.cache
def description() -> idl.Description:
    """Parse the description of org.qkilld1. Raises ConfigError."""
    file = f"{INTERFACE}.varlink"
    path = next((p for d in _DIRECTORIES if (p := d / file).exists()), _DIRECTORIES[0] / file)
    try:
        return idl.parse(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the description of {INTERFACE} cannot be read: {error}; install qkilld anew"
        ) from None


@functools.cache
def _service_description() -> idl.Description:
    return idl.parse(_SERVICE_TEXT)


class ProcessAuthority(Protocol):
    """Decides whether to permit an action of a process whose user is neither root nor the owner of
    the guest. Implemented by polkit's client."""

    async def check_process(
        self, pidfd: int, uid: int, action: PolkitAction, details: Mapping[str, str]
    ) -> Answer:
        """Decide on one action of a process that connected as `uid`. Raises Busy."""


class VarlinkCaller:
    """The connected peer. Implements engine.ports.Caller."""

    def __init__(self, server: VarlinkServer, connection: VarlinkConnection) -> None:
        self._server = server
        self._connection = connection
        self._uid: int = connection.uid
        self.pid = connection.pid
        """0 if unknown."""

    async def uid(self) -> int:
        return self._uid

    async def may(self, action: PolkitAction, details: Mapping[str, str], *, ask: bool) -> Answer:
        """Ask polkit about the pidfd of the peer, without a password dialog. Return DENIED if the
        kernel has no pidfd of the peer (before 6.5), or if polkit does not accept one (before 124).
        A process id is not sufficient, because another process may have it now."""
        authority = self._server.authority
        if authority is None or (pidfd := self._connection.open_peer()) is None:
            return Answer.DENIED
        try:
            return await authority.check_process(pidfd, self._uid, action, details)
        finally:
            os.close(pidfd)


Method = Callable[["VarlinkCall", dict[str, Any]], Coroutine[Any, Any, dict[str, Any] | None]]
"""Takes the call and its parameters, and returns the parameters of the reply; None if the method
replies by itself."""


class Methods(Protocol):
    """The methods of org.qkilld1."""

    def find(self, name: str) -> Method: ...

    def costs(self, name: str, parameters: Mapping[str, Any]) -> list[Cost]:
        """Return the costs of a call, which count against the limits."""


class _ServiceError(Exception):
    """An error of org.varlink.service, with its parameters."""

    def __init__(self, name: str, **parameters: str) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


class VarlinkCall:
    """One call. Implements engine.turns.WaitingCall and streams.StreamingCall."""

    def __init__(
        self,
        server: VarlinkServer,
        connection: VarlinkConnection,
        message: bytes,
        descriptors: list[int],
    ) -> None:
        self._server = server
        self.connection = connection
        self.message = message
        self._descriptors = dict(enumerate(descriptors))
        """The descriptors sent with the call, by index, without those that were taken. They are
        closed when the call ends, or when it only waits for its job."""
        self.uid = connection.uid
        self.caller = VarlinkCaller(server, connection)
        self.more = False
        self.oneway = False
        self.task: asyncio.Task[None] | None = None
        self.on_disconnect: Callable[[], None] = lambda: None
        """Called if the client disconnects before the reply."""
        self.costs: list[Cost] = []
        """The costs of this call, which count against the limits."""
        self._has_ended = False

    def start(self, uid: int) -> None:
        self._server.begin(self)

    def refuse(self, error: QkilldError) -> None:
        if isinstance(error, AccessDenied):
            name, text = f"{SERVICE_INTERFACE}.PermissionDenied", f"{error}; {ADVICE}"
        else:
            name, text = f"{INTERFACE}.{type_name(error)}", str(error)
        self.fail(name, {"message": text})

    def fail(self, name: str, parameters: Mapping[str, str]) -> None:
        self._reply({"error": name, "parameters": dict(parameters)})
        self.end()

    @property
    def blocked(self) -> bool:
        return self.connection.blocked

    def when_sent(self, callback: Callable[[], None]) -> None:
        self.connection.when_sent(callback)

    def progress(self, parameters: dict[str, Any]) -> None:
        if self.more:
            self._reply({"parameters": parameters, "continues": True})

    def progress_encoded(self, parameters: bytes) -> None:
        if self.more:
            self._reply_encoded(b'{"parameters":%b,"continues":true}' % parameters)

    def finish(self, parameters: dict[str, Any]) -> None:
        self.finish_encoded(encode(parameters))

    def finish_encoded(self, parameters: bytes) -> None:
        self._reply_encoded(b'{"parameters":%b}' % parameters)
        self.end()

    async def finish_list(
        self, name: str, elements: Iterable[Mapping[str, Any]], **more: object
    ) -> None:
        """Finish with a reply that has a list of any length, and the members of `more`."""
        encoded = []
        async with self._server.turns.long_replies.turn(self.uid) as pace:
            for element in elements:
                encoded.append(encode(element))
                await pace.rest()
            self.finish_encoded(encode_list(name, encoded, more))

    def abandon(self) -> None:
        self.connection.close()
        self.end()

    def take_descriptor(self, index: int) -> int:
        """Return a descriptor that came with the call. The caller of this method must close it.
        Raises InvalidArgs."""
        try:
            return self._descriptors.pop(index)
        except KeyError:
            raise InvalidArgs(f"No descriptor {index} came with the call") from None

    def _close_descriptors(self) -> None:
        while self._descriptors:
            close_later(self._descriptors.popitem()[1])

    def now_waits(self) -> None:
        """Free the resources that the work of the call needed. Call this when the work is done, and
        the call only waits for its job."""
        self._close_descriptors()
        for cost in self.costs:
            if cost is not Cost.WAIT:
                self._server.turns.limits.end(self.uid, cost)
        self.costs = [cost for cost in self.costs if cost is Cost.WAIT]

    def end(self) -> None:
        """End an answered call. The connection's next call begins when the socket has taken the
        reply."""
        if self._has_ended:
            return
        self._has_ended = True
        self._close_descriptors()
        self.connection.when_sent(self._ended)

    def _ended(self) -> None:
        for cost in self.costs:
            self._server.turns.limits.end(self.uid, cost)
        self.costs.clear()
        self._server.ended(self)
        self.connection.next_call()

    def charge(self, cost: Cost) -> None:
        """Count a further cost of this call. Raises Busy."""
        self._server.turns.limits.begin(self.uid, cost)
        self.costs.append(cost)

    def _reply(self, message: dict[str, Any]) -> None:
        self._reply_encoded(encode(message))

    def _reply_encoded(self, message: bytes) -> None:
        if not self.oneway and not self._has_ended:
            self.connection.send_encoded(message)


class VarlinkServer:
    """Answers calls received over listening sockets. Create it in a running loop."""

    def __init__(
        self,
        methods: Methods,
        turns: Turns,
        on_fault: Callable[[str, BaseException], None],
    ) -> None:
        """Raises ConfigError if the interface description is missing."""
        self._methods = methods
        self.turns = turns
        self.authority: ProcessAuthority | None = None
        """None if there is no system bus."""
        self._on_fault = on_fault
        self._description = description()
        self._loop = asyncio.get_running_loop()
        self._listening: list[socket.socket] = []
        self._names = map("varlink-{}".format, itertools.count(1))
        self._connections: dict[VarlinkConnection, VarlinkCall | None] = {}
        """For each connection: the call that is being answered, or will be answered next."""
        self._in_work = 0
        """The number of open calls, including those of closed connections."""
        self._quiet = asyncio.Event()
        """Set while there is no open call."""
        self._quiet.set()
        self._has_answered = asyncio.Event()
        """Set as soon as a call has been answered."""
        self._per_user: Counter[int] = Counter()
        """The number of connections of each user."""
        self._budget = InputBudget(turns.unlimited)

    def listen(self, listener: socket.socket) -> None:
        """Accept connections on a socket, which `close` closes."""
        listener.setblocking(False)
        self._listening.append(listener)
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    @property
    def listens(self) -> bool:
        return bool(self._listening)

    @property
    def busy(self) -> bool:
        """Whether calls are open."""
        return self._in_work > 0

    def stop_listening(self) -> None:
        """Accept no more connections. New connections wait in the socket for the next start of the
        daemon."""
        for listener in self._listening:
            self._loop.remove_reader(listener.fileno())

    def listen_again(self) -> None:
        for listener in self._listening:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def answer_first(self, timeout_s: float) -> None:
        """Wait until the calls that came before the daemon's start have been answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_answered.wait()
                await self._quiet.wait()

    async def drain(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()

    def close(self) -> None:
        """Close all connections, as a crash would."""
        self.stop_listening()
        for listener in self._listening:
            listener.close()
        self._listening.clear()
        for connection in list(self._connections):
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # Wait before the next attempt. Retrying at once would keep the loop busy, for
                # example if no descriptor is free.
                note_once("accepting a connection on Varlink", error)
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(RETRY_ACCEPT_S, self._accept_again, listener)
                return
            self._accepted(sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listening:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accepted(self, sock: socket.socket) -> None:
        try:
            connection = VarlinkConnection(
                sock, next(self._names), self._budget, self._on_call, self._on_close
            )
        except OSError as error:
            note_once("accepting a connection on Varlink", error)
            close_later(sock.detach())
            return
        uid = connection.uid
        self._connections[connection] = None
        self._per_user[user_of(uid)] += 1
        # A connection needs a descriptor, so apply the limits of calls that open descriptors.
        if uid not in self.turns.unlimited:
            with contextlib.suppress(Busy):
                self.turns.limits.check_descriptors(uid)
                if self._per_user[user_of(uid)] <= MAX_CONNECTIONS:
                    return
            connection.close()

    def _on_call(
        self, connection: VarlinkConnection, message: bytes, descriptors: list[int]
    ) -> None:
        call = VarlinkCall(self, connection, message, descriptors)
        self._connections[connection] = call
        self._in_work += 1
        self._quiet.clear()
        self.turns.put(connection.name, connection.uid, call, len(message))

    def _on_close(self, connection: VarlinkConnection) -> None:
        call = self._connections.pop(connection)
        user = user_of(connection.uid)
        self._per_user[user] -= 1
        if not self._per_user[user]:
            del self._per_user[user]
        # The call continues, although its client no longer waits for the reply.
        if call is not None:
            call.on_disconnect()

    def ended(self, call: VarlinkCall) -> None:
        """Forget a call that has ended."""
        self._in_work -= 1
        self._has_answered.set()
        if not self._in_work:
            self._quiet.set()
        if self._connections.get(call.connection) is call:
            self._connections[call.connection] = None

    def begin(self, call: VarlinkCall) -> None:
        """Answer a call at once, or start a task that answers it."""
        try:
            self._begin(call)
        except _ServiceError as error:
            call.fail(f"{SERVICE_INTERFACE}.{error.name}", error.parameters)
        except QkilldError as error:
            call.refuse(error)
        except ValueError as error:
            # The message is malformed, so it gets no reply, and the connection is closed.
            note_once("reading a call on Varlink", error)
            call.abandon()
        except Exception as error:
            self._failed(call, error)

    def _begin(self, call: VarlinkCall) -> None:
        message, call.message = decode_json(call.message), b""
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            raise ValueError("no method is named")
        for flag in ("oneway", "more", "upgrade"):
            if not isinstance(message.get(flag, False), bool):
                raise ValueError(f"{flag} is neither true nor false")
        parameters = message.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError("the parameters are not an object")
        call.oneway = message.get("oneway", False)
        call.more = message.get("more", False)
        if message.get("upgrade"):
            raise _ServiceError("InvalidParameter", parameter="upgrade")
        interface, _, name = message["method"].rpartition(".")
        if interface == SERVICE_INTERFACE:
            call.finish(self._about(name, parameters))
            return
        if interface != INTERFACE:
            raise _ServiceError("InterfaceNotFound", interface=printable(interface))
        self._check(self._description, name, parameters)
        costs = self._methods.costs(name, parameters)
        if call.more and name.startswith("Terminate"):
            costs.append(Cost.WAIT)
        self._run(call, name, parameters, costs)

    def _check(self, interface: idl.Description, name: str, parameters: dict[str, Any]) -> None:
        if name not in interface.methods:
            raise _ServiceError("MethodNotFound", method=printable(f"{interface.name}.{name}"))
        try:
            interface.check(parameters, interface.methods[name].takes)
        except idl.WrongValue as error:
            raise _ServiceError("InvalidParameter", parameter=printable(error.place)) from None

    def _about(self, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._check(_service_description(), name, parameters)
        if name == "GetInfo":
            return {
                "vendor": "qkilld",
                "product": "qkilld",
                "version": __version__,
                "url": "man:qkilld(8)",
                "interfaces": [SERVICE_INTERFACE, INTERFACE],
            }
        wanted = parameters["interface"]
        if wanted == INTERFACE:
            return {"description": self._description.text}
        if wanted == SERVICE_INTERFACE:
            return {"description": _SERVICE_TEXT}
        raise _ServiceError("InterfaceNotFound", interface=printable(wanted))

    def _run(
        self, call: VarlinkCall, name: str, parameters: dict[str, Any], costs: list[Cost]
    ) -> None:
        limits = self.turns.limits
        if Cost.READ in costs or name.startswith("Terminate"):
            limits.check_descriptors(call.uid)
        for cost in costs:
            call.charge(cost)
        answer = self._methods.find(name)(call, parameters)
        call.task = self._loop.create_task(self._answer(call, name, answer))
        # Close the coroutine in case the task is cancelled before it begins.
        call.task.add_done_callback(lambda _: answer.close())

    async def _answer(
        self,
        call: VarlinkCall,
        name: str,
        answer: Coroutine[Any, Any, dict[str, Any] | None],
    ) -> None:
        try:
            result = await answer
        except QkilldError as error:
            if isinstance(error, BusError):
                self._failed(call, error)
            else:
                call.refuse(error)
        except asyncio.CancelledError:
            call.end()
        except Exception as error:
            self._failed(call, error)
        else:
            if result is not None:
                call.finish(result)

    def _failed(self, call: VarlinkCall, error: Exception) -> None:
        self._on_fault("answering a call on Varlink", error)
        call.refuse(Failed("Internal error; qkilld's journal has the details"))
