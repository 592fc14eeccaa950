"""Serve objects on a bus.

Users take turns: a call waits until engine.turns starts it. Then its path, interface, member,
signature and length are checked against the interface's XML, and only then is its body parsed. The
caller gets our own QkilldError under its D-Bus name, but no details of other exceptions or of
failures of other services.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, Protocol

from qkilld.bus import interfaces
from qkilld.bus.connection import CallFailed, Connection
from qkilld.bus.framing import MAX_CALL, Flags, IncomingMessage
from qkilld.bus.interfaces import Interface, introspection
from qkilld.bus.library import Variant, encode_body
from qkilld.bus.listing import Listing, Listings
from qkilld.bus.values import parse
from qkilld.engine.call_limits import Cost
from qkilld.engine.turns import FULL, Turns, WaitingCall
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.constants import MANAGER_PATH
from qkilld.model.errors import BusError, Busy, Failed, InvalidArgs, QkilldError
from qkilld.model.text import printable

MAX_NAMES: Final = 4096
"""The number of connections whose uid is cached."""
MAX_ASKING: Final = 32
"""How many uids of connections may be requested from the bus at a time."""
MAX_DEPTH: Final = 3
"""The maximum nesting depth of values in a call, enough for an option that is a list."""

_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_ERROR: Final = "org.freedesktop.DBus.Error."
_PROPERTIES_METHODS: Final = {"Get": "ss", "GetAll": "s", "Set": "ssv"}
_READS: Final = frozenset({"Inspect", "Plan", "ListGuests", "ListJobs"})


class BusCaller:
    """The sender of one call. Implements engine.ports.Caller."""

    def __init__(self, server: Server, call: IncomingMessage, uid: int) -> None:
        self._server = server
        self._uid = uid
        self.sender = call.sender
        """The unique bus name."""
        self.interactive = bool(call.flags & Flags.ALLOW_INTERACTIVE_AUTHORIZATION)
        """Whether polkit may ask the caller for a password."""
        self.wants_reply = call.wants_reply

    @property
    def disconnected(self) -> bool:
        """Whether the caller of a cancelled call had left the bus."""
        return not self._server.draining

    async def uid(self) -> int:
        return self._uid

    async def may(self, action: PolkitAction, details: Mapping[str, str], *, ask: bool) -> Answer:
        authority = self._server.authority
        if authority is None:
            return Answer.DENIED
        interactive = ask and self.interactive
        if interactive:
            # End the password dialog if the caller leaves.
            await self.end_call_with_connection()
        answer = await authority.check(
            self.sender, self._uid, action, details, interactive=interactive
        )
        if answer is Answer.CHALLENGE and self.interactive:
            # The caller has allowed a password dialog already, so asking them to allow it would not
            # help.
            return Answer.DENIED
        return answer

    async def end_call_with_connection(self) -> None:
        """Cancel the call if its caller leaves the bus before the reply."""
        await self._server.notice_disconnect(self.sender)


Body = list[Any] | Listing
"""The values of a reply, or the Listing that is its only value."""
Method = Callable[..., Coroutine[Any, Any, Body]]
"""Takes the BusCaller and the arguments, returns the body of the reply."""


class BusObject(Protocol):
    interface: Interface
    methods: Mapping[str, Method]

    def properties(self, uid: int) -> Mapping[str, Any]:
        """Return every property in its D-Bus type. Values that this uid may not see are unknown or
        empty."""


class Authority(Protocol):
    """Decides what callers other than root and the owner of the process may do. Implemented by
    polkit's client."""

    async def check(
        self,
        sender: str,
        uid: int,
        action: PolkitAction,
        details: Mapping[str, str],
        *,
        interactive: bool,
    ) -> Answer:
        """Decide on one action. `uid` is the user of the bus name `sender`. Raises Busy."""


class ObjectTree(Protocol):
    """The objects of a server."""

    def find(self, path: str) -> BusObject | None:
        """Return the object at that path, None if there is none. May raise a QkilldError
        instead."""

    def children(self, path: str) -> list[str]: ...

    async def managed(self, sender: str, uid: int) -> Listing:
        """Return the value of GetManagedObjects. Raises a QkilldError."""


class NoReply(Exception):
    """Raised for a call that we do not answer. When the daemon leaves the bus, the bus answers the
    call as after a crash (org.freedesktop.DBus.Error.NoReply)."""


class _NoSuch(Exception):
    """A missing object, interface, method or property; `name` is the name of the D-Bus error
    without its prefix."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class BusCall:
    """A call that has not started yet. Implements engine.turns.WaitingCall."""

    __slots__ = ("_call", "_server")

    def __init__(self, server: Server, call: IncomingMessage) -> None:
        self._server = server
        self._call = call

    def start(self, uid: int) -> None:
        self._server.start(self._call, uid)

    def refuse(self, error: QkilldError) -> None:
        self._server.refuse(self._call, error, later=error is FULL)


class Server:
    """Answers the calls received over one connection."""

    def __init__(
        self,
        connection: Connection,
        tree: ObjectTree,
        on_fault: Callable[[str, BaseException], None],
        turns: Turns,
        authority: Authority | None = None,
    ) -> None:
        self._connection = connection
        self._tree = tree
        self._on_fault = on_fault
        self.authority = authority
        """None unless this is the system bus, because polkit cannot identify callers on other
        buses."""
        self._turns = turns
        self._listings = Listings()
        self._waiting: Counter[str] = Counter()
        """The number of each sender's calls that have not started yet."""
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._waits: set[asyncio.Task[None]] = set()
        """The members of _tasks that only wait for a job."""
        self._uids: OrderedDict[str, int] = OrderedDict()
        """The uid of each unique name, least recently used first. The bus never reuses unique
        names."""
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._asking_slots = asyncio.Semaphore(MAX_ASKING)
        self._noticed: set[str] = set()
        self.draining = False
        """Whether calls end because the daemon leaves or loses the bus, not because their callers
        left."""
        connection.on_call = self._on_call
        connection.watch_names(self._owner_changed)

    async def notice_disconnect(self, sender: str) -> None:
        """Ask the bus to report when the sender leaves, so that its calls end too.

        The bus is asked only while a call is open, because otherwise every client that leaves the
        bus would wake us. If the bus refuses (it limits our match rules), the calls continue until
        they are answered.
        """
        if sender in self._noticed:
            return
        self._noticed.add(sender)
        try:
            # The bus handles calls in order: when NameHasOwner is answered, AddMatch is done.
            self._connection.tell_bus("AddMatch", "s", _disconnect_rule(sender))
            (exists,) = await self._connection.request_bus("NameHasOwner", "s", sender)
        except QkilldError:
            self._forget(sender)
            return
        if not exists:
            self._disconnected(sender)

    def emit(self, path: str, interface: Interface, member: str, *body: Any) -> None:
        """Send a signal. Does nothing if the connection is lost."""
        signature = interface.signals[member]
        self._connection.emit(path, interface.name, member, signature, list(body))

    def emit_added(self, path: str, interface: Interface, values: Mapping[str, Any]) -> None:
        """Broadcast InterfacesAdded."""
        self._listings.announced(path)
        described = {interface.name: variants(interface, values)}
        self._send_from_manager("InterfacesAdded", "oa{sa{sv}}", [path, described])

    def emit_removed(self, path: str, interface: Interface) -> None:
        """Broadcast InterfacesRemoved."""
        self._listings.announced(path)
        self._send_from_manager("InterfacesRemoved", "oas", [path, [interface.name]])

    def emit_changed(
        self, path: str, interface: Interface, values: Mapping[str, Any], invalidated: Iterable[str]
    ) -> None:
        """Broadcast PropertiesChanged. `invalidated`: properties that are named without their
        values."""
        self._listings.announced(path)
        body = [interface.name, variants(interface, values), list(invalidated)]
        self._connection.emit(path, _PROPERTIES, "PropertiesChanged", "sa{sv}as", body)

    @property
    def busy(self) -> bool:
        """Whether calls are open."""
        return bool(self._tasks or self._waiting or self._asking)

    @property
    def has_room(self) -> bool:
        """Whether signals can be sent without filling the memory. True if the connection is
        lost."""
        return self._connection.has_room

    async def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for open calls to be answered, then cancel the rest."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.busy:
                    if tasks := self._all_tasks():
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.sleep(0)
        late = self._all_tasks()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self.forget_waiting(_stopping_error())
        self._connection.send_held_back()
        self.draining = False

    def close(self) -> None:
        """Drop the calls that have not started and those that only wait for a job: the connection
        is lost or about to be closed. Other calls continue, because they may have to stop a
        guest."""
        self.draining = True
        for task in self._waits:
            task.cancel()
        self.forget_waiting(None)

    def forget_waiting(self, error: QkilldError | None) -> None:
        """Drop the calls that have not started. Reply to each with `error`, unless it is None."""
        for sender in list(self._waiting):
            for call in self._forget_waiting(sender):
                if error is not None:
                    call.refuse(error)

    def _forget_waiting(self, sender: str) -> list[WaitingCall]:
        self._waiting.pop(sender, None)
        return self._turns.forget(sender, self._uids.get(sender))

    def _all_tasks(self) -> list[asyncio.Task[None]]:
        return [*self._asking.values(), *(task for group in self._tasks.values() for task in group)]

    def _on_call(self, call: IncomingMessage) -> None:
        sender, uid = call.sender, self._uids.get(call.sender)
        if not self._turns.put(sender, uid, BusCall(self, call), len(call.body or b"")):
            return
        self._waiting[sender] += 1
        if uid is not None:
            self._uids.move_to_end(sender)
        elif sender not in self._asking:
            task = asyncio.get_running_loop().create_task(self._ask_uid(sender))
            self._asking[sender] = task
            task.add_done_callback(lambda _: self._asking.pop(sender))

    async def _ask_uid(self, sender: str) -> None:
        try:
            async with self._asking_slots:
                uid = await self._connection.uid_of(sender)
        except (QkilldError, asyncio.CancelledError) as error:
            for call in self._forget_waiting(sender):
                call.refuse(
                    _service_failure() if isinstance(error, QkilldError) else _stopping_error()
                )
            return
        self._remember(sender, uid)
        self._turns.introduce(sender, uid)

    def _remember(self, sender: str, uid: int) -> None:
        """Cache a uid. If the cache is full, drop the least recently used name that has no waiting
        calls: a new call of a dropped name would overtake its waiting calls. If all names have
        waiting calls, drop the least recently used one."""
        if len(self._uids) >= MAX_NAMES:
            oldest = next(iter(self._uids))
            del self._uids[next((one for one in self._uids if one not in self._waiting), oldest)]
        self._uids[sender] = uid

    def start(self, call: IncomingMessage, uid: int) -> None:
        """Answer a call at once, or start a task that answers it."""
        self._waiting[call.sender] -= 1
        if self._waiting[call.sender] <= 0:
            del self._waiting[call.sender]
        self._start(call, uid)

    def _start(self, call: IncomingMessage, uid: int) -> None:
        try:
            match call.interface:
                case "org.freedesktop.DBus.Introspectable":
                    self._reply(call, *self._introspect(call))
                case "org.freedesktop.DBus.Properties":
                    self._reply(call, *self._properties(call, uid))
                case interfaces.OBJECT_MANAGER if call.path == MANAGER_PATH:
                    self._run_get_managed_objects(call, uid)
                case "org.freedesktop.DBus.Peer" if call.member == "Ping" and not call.signature:
                    self._reply(call, "", [])
                case "org.freedesktop.DBus.Peer":
                    self._run(call, uid, self._machine_id(call), Cost.OTHER)
                case _:
                    self._start_method(call, uid)
        except Exception as error:
            self._failed(call, error)

    def _run_get_managed_objects(self, call: IncomingMessage, uid: int) -> None:
        if call.member != "GetManagedObjects" or call.signature:
            raise _NoSuch("UnknownMethod", "ObjectManager has only GetManagedObjects()")
        self._turns.limits.check_descriptors(uid)
        answer = self._tree.managed(call.sender, uid)
        self._run(call, uid, answer, Cost.READ, interfaces.OBJECT_MANAGER_GIVES)

    def _start_method(self, call: IncomingMessage, uid: int) -> None:
        bus_object = self._tree.find(call.path)
        if bus_object is None:
            raise _no_object(call)
        if call.interface not in ("", bus_object.interface.name):
            raise _NoSuch("UnknownInterface", f"No interface {printable(call.interface)} there")
        signature = bus_object.interface.methods.get(call.member)
        if signature is None:
            raise _NoSuch(
                "UnknownMethod",
                f"{bus_object.interface.name} has no method {printable(call.member)}",
            )
        arguments = _arguments(call, signature.takes, signature.shown)
        cost = Cost.OTHER
        if call.member == "Wait":
            cost = Cost.WAIT
        elif call.member in _READS:
            cost = Cost.READ
        if cost is Cost.READ or call.member.startswith("Terminate"):
            self._turns.limits.check_descriptors(uid)
        method = bus_object.methods[call.member]
        answer = method(BusCaller(self, call, uid), *arguments)
        self._run(call, uid, answer, cost, signature.gives)

    def _run(
        self,
        call: IncomingMessage,
        uid: int,
        answer: Coroutine[Any, Any, Body],
        cost: Cost,
        gives: str = "s",
    ) -> None:
        try:
            self._turns.limits.begin(uid, cost)
        except Busy:
            answer.close()
            raise
        call.body = None  # Free the memory of a long body during a long call.
        sender = call.sender
        task = asyncio.get_running_loop().create_task(self._answer(call, uid, answer, gives))
        self._tasks.setdefault(sender, set()).add(task)
        if cost is Cost.WAIT:
            self._waits.add(task)

        def finished(task: asyncio.Task[None]) -> None:
            answer.close()  # Avoid Python's warning if the task was cancelled before it began.
            self._waits.discard(task)
            self._turns.limits.end(uid, cost)
            self._finished(sender, task)

        task.add_done_callback(finished)

    async def _answer(
        self, call: IncomingMessage, uid: int, answer: Coroutine[Any, Any, Body], gives: str
    ) -> None:
        try:
            body = await answer
            if isinstance(body, Listing):
                await self._reply_listing(call, uid, gives, body)
            else:
                self._reply(call, gives, body)
        except NoReply:
            pass
        except asyncio.CancelledError:
            self.refuse(call, _stopping_error())
            raise
        except Exception as error:
            self._failed(call, error)

    def _failed(self, call: IncomingMessage, error: Exception) -> None:
        if isinstance(error, _NoSuch):
            self._connection.refuse(call, _ERROR + error.name, str(error))
        elif isinstance(error, QkilldError) and not isinstance(error, (CallFailed, BusError)):
            self.refuse(call, error)
        elif isinstance(error, BusError):
            self.refuse(call, _service_failure())
        else:
            # Details go only to the journal, because callers must not see internal messages or
            # those of other services.
            self._on_fault(f"answering {printable(call.member)}", error)
            is_remote = isinstance(error, CallFailed)
            self.refuse(call, _service_failure() if is_remote else _internal())

    def _introspect(self, call: IncomingMessage) -> tuple[str, list[Any]]:
        if call.member != "Introspect" or call.signature:
            raise _NoSuch("UnknownMethod", "Introspectable has only Introspect()")
        bus_object = self._tree.find(call.path)
        children = self._tree.children(call.path)
        if bus_object is None and not children:
            raise _no_object(call)
        return "s", [introspection(bus_object.interface if bus_object else None, children)]

    async def _machine_id(self, call: IncomingMessage) -> list[Any]:
        if call.member != "GetMachineId" or call.signature:
            raise _NoSuch("UnknownMethod", f"Peer has no method {printable(call.member)}")
        return await self._connection.machine_id()

    def _properties(self, call: IncomingMessage, uid: int) -> tuple[str, list[Any]]:
        bus_object = self._tree.find(call.path)
        if bus_object is None:
            raise _no_object(call)
        takes = _PROPERTIES_METHODS.get(call.member)
        if takes is None:
            raise _NoSuch("UnknownMethod", f"Properties has no method {printable(call.member)}")
        interface, *rest = _arguments(call, takes, takes)
        # Accept an empty interface, which the specification allows if the member is unambiguous.
        if interface not in ("", bus_object.interface.name):
            raise _NoSuch("UnknownInterface", f"No interface {printable(interface)} there")
        types = bus_object.interface.properties
        if call.member == "GetAll":
            return "a{sv}", [variants(bus_object.interface, bus_object.properties(uid))]
        name = rest[0]
        if name not in types:
            raise _NoSuch(
                "UnknownProperty", f"{bus_object.interface.name} has no property {printable(name)}"
            )
        if call.member == "Set":
            raise _NoSuch("PropertyReadOnly", f"{name} cannot be set")
        return "v", [Variant(types[name], bus_object.properties(uid)[name])]

    def _finished(self, sender: str, task: asyncio.Task[None]) -> None:
        group = self._tasks.get(sender)
        if group is None:
            return
        group.discard(task)
        if not group:
            del self._tasks[sender]
            self._forget(sender)

    def _owner_changed(self, body: list[Any]) -> None:
        name, _, owner = body
        if not owner:
            self._disconnected(name)

    def _disconnected(self, sender: str) -> None:
        """Drop the calls and the cached uid of a caller that has left the bus."""
        self._forget_waiting(sender)
        self._uids.pop(sender, None)
        for task in self._tasks.pop(sender, ()):
            task.cancel()
        self._forget(sender)

    def _forget(self, sender: str) -> None:
        if sender in self._noticed:
            self._noticed.remove(sender)
            self._connection.tell_bus("RemoveMatch", "s", _disconnect_rule(sender))

    def _reply(self, call: IncomingMessage, signature: str, body: list[Any]) -> None:
        if call.wants_reply:
            self._connection.reply(call, signature, encode_body(signature, body))

    async def _reply_listing(
        self, call: IncomingMessage, uid: int, signature: str, listing: Listing
    ) -> None:
        while call.wants_reply:
            # Wait for room, because replies of many megabytes must not pile up. Do this before the
            # turn begins, because other callers, including those on Varlink, wait for the end of
            # the turn.
            await self._connection.wait_for_room()
            async with self._turns.long_replies.turn(uid) as pace:
                if self._connection.has_room:
                    body = await self._listings.encode(signature, listing, pace)
                    self._connection.reply(call, signature, body)
                    return

    def refuse(self, call: IncomingMessage, error: QkilldError, *, later: bool = False) -> None:
        refuse = self._connection.refuse_later if later else self._connection.refuse
        refuse(call, error.bus_name, str(error))

    def _send_from_manager(self, member: str, signature: str, body: list[Any]) -> None:
        self._connection.emit(MANAGER_PATH, interfaces.OBJECT_MANAGER, member, signature, body)


def variants(interface: Interface, values: Mapping[str, Any]) -> dict[str, Variant]:
    """Return properties of an interface with their types."""
    return {name: Variant(interface.properties[name], value) for name, value in values.items()}


def _arguments(call: IncomingMessage, takes: str, shown: str) -> list[Any]:
    """Parse the body if its signature is what the method takes. Raises InvalidArgs."""
    if call.signature != takes:
        signature = printable(call.signature)
        raise InvalidArgs(f"{call.member} takes ({shown}), not ({signature})")
    if call.body is None:
        raise InvalidArgs(f"A call of {call.member} must not be longer than {MAX_CALL} bytes")
    try:
        return parse(takes, call.body, call.order, max_depth=MAX_DEPTH)
    except ValueError:
        raise InvalidArgs(f"The arguments of {call.member} cannot be read") from None


def _no_object(call: IncomingMessage) -> _NoSuch:
    return _NoSuch("UnknownObject", f"No object at {printable(call.path)}")


def _internal() -> Failed:
    return Failed("Internal error; qkilld's journal has the details")


def _stopping_error() -> Failed:
    return Failed("qkilld is stopping")


def _service_failure() -> Failed:
    return Failed("Another service that qkilld needs for this call failed; try again")


def _disconnect_rule(sender: str) -> str:
    return (
        "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
        f"member='NameOwnerChanged',arg0='{sender}'"
    )
