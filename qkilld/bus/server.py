"""Serving objects on a bus: from a message to a method of ours and back.

Every call is checked against the interface's XML before it goes anywhere. What a method raises on
purpose (QkilldError) goes to the caller by its D-Bus name, anything else to the journal alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from qkilld.bus.connection import CallFailed, Connection
from qkilld.bus.interfaces import Interface, introspection
from qkilld.model.access import Action, Answer
from qkilld.model.errors import BusError, Busy, Failed, InvalidArgs, QkilldError

MAX_CALLS_PER_SENDER: Final = 4096
"""Calls of one connection that may be in work at once, most of them Waits."""

_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_ERROR: Final = "org.freedesktop.DBus.Error."


class Caller(NamedTuple):
    sender: str
    """The unique bus name."""
    interactive: bool
    """It allows to be asked for authorization."""
    wants_reply: bool


Method = Callable[..., Awaitable[list[Any]]]
"""Takes the Caller and the arguments, gives the body of the reply."""


class BusObject(Protocol):
    interface: Interface
    methods: Mapping[str, Method]

    def property(self, name: str) -> Any:
        """The value in the interface's type."""


class Authority(Protocol):
    """Who lets a caller do what is not theirs by right: polkit."""

    async def check(
        self,
        sender: str,
        uid: int,
        action: Action,
        details: Mapping[str, str],
        *,
        interactive: bool,
    ) -> Answer:
        """Raises Busy. `uid` is that of the owner of the bus name `sender`."""


class Tree(Protocol):
    """The objects that are served."""

    def find(self, path: str) -> BusObject | None:
        """The object at that path. Raises a QkilldError for one that is known to be missing."""

    def children(self, path: str) -> list[str]: ...


class Unanswered(Exception):
    """A call that gets no answer of ours: the daemon leaves the bus with it open, and the bus tells
    the caller so, as it would after a crash (org.freedesktop.DBus.Error.NoReply)."""


class _NoSuch(Exception):
    """An object, interface, method or property that is not there; `name` without its prefix."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Server:
    """Answers the calls that come in over one connection."""

    def __init__(
        self,
        connection: Connection,
        tree: Tree,
        on_fault: Callable[[str, BaseException], None],
        authority: Authority | None = None,
    ) -> None:
        self._connection = connection
        self._tree = tree
        self._on_fault = on_fault
        self.authority = authority
        """None where polkit has no say: on every bus but the system's."""
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._uids: dict[str, int] = {}
        self._noticed: set[str] = set()
        self.draining = False
        """It is the daemon that ends the calls, and not those who called."""
        self.last_call = time.monotonic()
        """When a call came in last, time.monotonic()."""
        connection.add_message_handler(self._on_message)

    async def uid_of(self, caller: Caller) -> int:
        """The uid of the caller's connection, from the bus itself."""
        if (uid := self._uids.get(caller.sender)) is None:
            uid = await self._connection.uid_of(caller.sender)
            # A unique name is never given twice, so the answer stays true for as long as it counts.
            while len(self._uids) >= 1024:
                del self._uids[next(iter(self._uids))]
            self._uids[caller.sender] = uid
        return uid

    async def notice_disconnect(self, caller: Caller) -> None:
        """Ask the bus to say when this caller goes, so that its calls end then.

        Asked for only while it waits: otherwise every client that leaves the bus would wake us.
        Where the bus refuses (it lets a connection have so many match rules and no more), its calls
        go on till they are answered.
        """
        if caller.sender in self._noticed:
            return
        self._noticed.add(caller.sender)
        try:
            await self._connection.request_bus("AddMatch", "s", _gone_rule(caller.sender))
            (there,) = await self._connection.request_bus("NameHasOwner", "s", caller.sender)
        except QkilldError:
            self._forget(caller.sender)
            return
        if not there:
            self._disconnected(caller.sender)

    def emit(self, path: str, interface: Interface, member: str, *body: Any) -> None:
        """Send a signal of ours; with the bus gone nothing happens."""
        self._send(
            Message.new_signal(path, interface.name, member, interface.signals[member], list(body))
        )

    def emit_changed(self, path: str, interface: Interface, values: Mapping[str, Any]) -> None:
        """Send PropertiesChanged."""
        changed = {name: Variant(interface.properties[name], v) for name, v in values.items()}
        self._send(
            Message.new_signal(
                path, _PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface.name, changed, []]
            )
        )

    @property
    def busy(self) -> bool:
        """Calls are in work."""
        return bool(self._tasks)

    async def drain(self, timeout_s: float) -> None:
        """Wait for the replies under way to be sent, then end what is left."""
        self.draining = True
        tasks = [task for group in self._tasks.values() for task in group]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self.draining = False

    def _on_message(self, message: Message) -> Message | bool:
        if message.message_type is MessageType.SIGNAL:
            if message.member == "NameOwnerChanged" and message.sender == "org.freedesktop.DBus":
                name, _, new_owner = message.body
                if not new_owner:
                    self._disconnected(name)
            return False
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        self.last_call = time.monotonic()
        sender = message.sender or ""
        group = self._tasks.setdefault(sender, set())
        if len(group) >= MAX_CALLS_PER_SENDER:
            self._reply_error(message, Busy("You have too many calls waiting here for an answer"))
            return True
        task = asyncio.get_running_loop().create_task(self._answer(message))
        group.add(task)
        task.add_done_callback(lambda done: self._finished(sender, done))
        return True

    async def _answer(self, message: Message) -> None:
        try:
            signature, body = await self._call(message)
            self._reply(message, Message.new_method_return(message, signature, body))
        except Unanswered:
            pass
        except CallFailed as error:
            # Another service's own words, which are not for our callers.
            self._on_fault(f"answering {message.member}", error)
            self._reply_error(message, _elsewhere())
        except BusError:
            self._reply_error(message, _elsewhere())
        except QkilldError as error:
            self._reply_error(message, error)
        except _NoSuch as error:
            self._reply(message, Message.new_error(message, _ERROR + error.name, str(error)))
        except asyncio.CancelledError:
            self._reply_error(message, Failed("qkilld is stopping"))
            raise
        except Exception as error:
            self._on_fault(f"answering {message.member}", error)
            self._reply_error(message, Failed("Internal error; qkilld's journal has the details"))

    async def _call(self, message: Message) -> tuple[str, list[Any]]:
        """The signature and the body of the reply."""
        caller = Caller(
            message.sender or "",
            MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION in message.flags,
            MessageFlag.NO_REPLY_EXPECTED not in message.flags,
        )
        match message.interface:
            case "org.freedesktop.DBus.Introspectable":
                return self._introspect(message)
            case "org.freedesktop.DBus.Peer":
                return await self._peer(message)
            case "org.freedesktop.DBus.Properties":
                return self._properties(message)
        found = self._tree.find(message.path)
        if found is None:
            raise _NoSuch("UnknownObject", f"No object at {message.path}")
        if message.interface not in (None, found.interface.name):
            raise _NoSuch("UnknownInterface", f"No interface {message.interface} there")
        signature = found.interface.methods.get(message.member)
        if signature is None:
            raise _NoSuch("UnknownMethod", f"{found.interface.name} has no method {message.member}")
        if message.signature != signature.takes:
            raise InvalidArgs(
                f"{message.member} takes ({signature.shown}), not ({message.signature})"
            )
        return signature.gives, await found.methods[message.member](caller, *message.body)

    def _introspect(self, message: Message) -> tuple[str, list[Any]]:
        if message.member != "Introspect" or message.signature:
            raise _NoSuch("UnknownMethod", "Introspectable has Introspect() and no other")
        found = self._tree.find(message.path)
        children = self._tree.children(message.path)
        if found is None and not children:
            raise _NoSuch("UnknownObject", f"No object at {message.path}")
        return "s", [introspection(found.interface if found else None, children)]

    async def _peer(self, message: Message) -> tuple[str, list[Any]]:
        match message.member, message.signature:
            case "Ping", "":
                return "", []
            case "GetMachineId", "":
                return "s", await self._connection.machine_id()
        raise _NoSuch("UnknownMethod", f"Peer has no method {message.member}")

    def _properties(self, message: Message) -> tuple[str, list[Any]]:
        found = self._tree.find(message.path)
        if found is None:
            raise _NoSuch("UnknownObject", f"No object at {message.path}")
        takes = {"Get": "ss", "GetAll": "s", "Set": "ssv"}.get(message.member)
        if takes is None:
            raise _NoSuch("UnknownMethod", f"Properties has no method {message.member}")
        if message.signature != takes:
            raise InvalidArgs(f"{message.member} takes ({takes}), not ({message.signature})")
        interface, *rest = message.body
        # The specification lets a caller leave the interface empty where it is clear.
        if interface not in ("", found.interface.name):
            raise _NoSuch("UnknownInterface", f"No interface {interface} there")
        types = found.interface.properties
        if message.member == "GetAll":
            values = {name: Variant(kind, found.property(name)) for name, kind in types.items()}
            return "a{sv}", [values]
        name = rest[0]
        if name not in types:
            raise _NoSuch("UnknownProperty", f"{found.interface.name} has no property {name}")
        if message.member == "Set":
            raise _NoSuch("PropertyReadOnly", f"{name} cannot be set")
        return "v", [Variant(types[name], found.property(name))]

    def _finished(self, sender: str, task: asyncio.Task[None]) -> None:
        group = self._tasks.get(sender)
        if group is None:
            return
        group.discard(task)
        if not group:
            del self._tasks[sender]
            self._forget(sender)

    def _disconnected(self, sender: str) -> None:
        """A caller is gone: nobody waits for its answers any more."""
        self._uids.pop(sender, None)
        for task in self._tasks.pop(sender, ()):
            task.cancel()
        self._forget(sender)

    def _forget(self, sender: str) -> None:
        if sender in self._noticed:
            self._noticed.remove(sender)
            self._connection.tell_bus("RemoveMatch", "s", _gone_rule(sender))

    def _reply(self, call: Message, reply: Message) -> None:
        if MessageFlag.NO_REPLY_EXPECTED not in call.flags:
            self._send(reply)

    def _reply_error(self, call: Message, error: QkilldError) -> None:
        self._reply(call, Message.new_error(call, error.bus_name, str(error)))

    def _send(self, message: Message) -> None:
        if self._connection.connected:
            self._connection.send(message)


def _elsewhere() -> Failed:
    return Failed("Another service that qkilld needs for this did not do its part; try again")


def _gone_rule(sender: str) -> str:
    return (
        "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
        f"member='NameOwnerChanged',arg0='{sender}'"
    )
