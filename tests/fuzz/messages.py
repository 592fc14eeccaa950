"""Hostile D-Bus messages from a seed. Source: D-Bus specification, "Message Protocol".

The bus forwards all valid messages, whatever their content is. If a connection sends an invalid
message, the bus closes the connection. Invalid messages are sent, too, because their senders then
disappear from the bus.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final
from xml.etree import ElementTree as ET

from tests.lab.process import TOP

BUS_NAME: Final = "org.qkilld1"
MANAGER: Final = "org.qkilld1.Manager"
JOB: Final = "org.qkilld1.Job"
GUEST: Final = "org.qkilld1.Guest"
MANAGER_PATH: Final = "/org/qkilld1"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY, NO_AUTOSTART, INTERACTIVE = 1, 2, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SENDER = 1, 2, 3, 4, 5, 6, 7
_SIGNATURE, _UNIX_FDS = 8, 9

_FIXED: Final = {
    "y": "B",
    "b": "I",
    "n": "h",
    "q": "H",
    "i": "i",
    "u": "I",
    "x": "q",
    "t": "Q",
    "d": "d",
    "h": "I",
}
_ALIGN: Final = {"s": 4, "o": 4, "g": 1, "a": 4, "v": 1, "(": 8, "{": 8} | {
    kind: struct.calcsize(code) for kind, code in _FIXED.items()
}
_BASIC: Final = "ybnqiuxtdsog"


class Writer:
    """Marshals values by a signature. A variant is a pair (signature, value)."""

    def __init__(self, order: str) -> None:
        self._order = order
        self.data = bytearray()

    def write(self, signature: str, values: Sequence[Any]) -> None:
        at = 0
        for value in values:
            end = end_of_type(signature, at)
            self._one(signature[at:end], value)
            at = end

    def align(self, to: int) -> None:
        self.data += bytes(-len(self.data) % to)

    def _pack(self, code: str, value: Any) -> None:
        self.data += struct.pack(self._order + code, value)

    def _one(self, kind: str, value: Any) -> None:
        first = kind[0]
        self.align(_ALIGN[first])
        if first in _FIXED:
            self._pack(_FIXED[first], value)
        elif first in "so":
            raw = value.encode() if isinstance(value, str) else value
            self._pack("I", len(raw))
            self.data += raw + b"\0"
        elif first == "g":
            self._signature(value)
        elif first == "v":
            self._signature(value[0])
            self._one(*value)
        elif first == "a":
            at = len(self.data)
            self._pack("I", 0)
            self.align(_ALIGN[kind[1]])
            start = len(self.data)
            for item in value:
                self._one(kind[1:], item)
            struct.pack_into(self._order + "I", self.data, at, len(self.data) - start)
        else:
            self.write(kind[1:-1], value)

    def _signature(self, text: str) -> None:
        raw = text.encode()
        self._pack("B", len(raw))
        self.data += raw + b"\0"


def end_of_type(signature: str, at: int) -> int:
    """Return the end of the complete type that begins at `at`."""
    while signature[at] == "a":
        at += 1
    if signature[at] not in "({":
        return at + 1
    depth = 0
    while True:
        depth += (signature[at] in "({") - (signature[at] in ")}")
        at += 1
        if not depth:
            return at


@dataclass
class Message:
    """A message to send."""

    kind: int = CALL
    path: str = MANAGER_PATH
    interface: str | None = MANAGER
    member: str = ""
    signature: str = ""
    body: Sequence[Any] = ()
    destination: str | None = BUS_NAME
    flags: int = 0
    order: str = "<"
    raw_body: bytes | None = None
    """The bytes of a body, in the message's byte order, to send instead of `body`."""
    fields: Sequence[tuple[int, str, Any]] = ()
    """Additional header fields, possibly duplicates."""
    descriptors: int = 0
    """The number of descriptors to send with the message."""

    @property
    def wants_reply(self) -> bool:
        return self.kind == CALL and not self.flags & NO_REPLY

    def marshal(self, serial: int) -> bytes:
        if self.raw_body is None:
            body = Writer(self.order)
            body.write(self.signature, self.body)
            raw = bytes(body.data)
        else:
            raw = self.raw_body
        given: list[tuple[int, str, Any]] = []
        if self.kind in (CALL, SIGNAL):
            given += [(_PATH, "o", self.path), (_MEMBER, "s", self.member)]
            if self.interface is not None:
                given.append((_INTERFACE, "s", self.interface))
        if self.destination is not None:
            given.append((_DESTINATION, "s", self.destination))
        if self.signature:
            given.append((_SIGNATURE, "g", self.signature))
        if self.descriptors:
            given.append((_UNIX_FDS, "u", self.descriptors))
        header = Writer(self.order)
        mark = ord("l" if self.order == "<" else "B")
        fields = [(code, (kind, value)) for code, kind, value in (*given, *self.fields)]
        start = (mark, self.kind, self.flags, 1, len(raw), serial, fields)
        header.write("yyyyuua(yv)", start)
        header.align(8)
        return bytes(header.data) + raw


class SendMode(Enum):
    """How a message is sent."""

    WHOLE = "whole"
    FLIPPED = "bits flipped"
    CUT = "cut off"
    """The connection ends in the middle of the message."""


@dataclass(frozen=True)
class Aims:
    """The targets of the messages."""

    own: Sequence[int] = ()
    """Pids of guests of the sender."""
    others: Sequence[int] = ()
    """Pids that the sender may not access."""


@dataclass
class Source:
    """An endless sequence of messages, determined by seed and aims."""

    seed: str
    aims: Aims = field(default_factory=Aims)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        kinds = [(weight, kind) for weight, kind, _ in _KINDS]
        self._weights = [weight for weight, _ in kinds]
        self._makers = [make for _, _, make in _KINDS]
        self._names = [name for _, name in kinds]

    def next(self) -> tuple[str, Message, SendMode]:
        """Return the name of the message's kind, the message, and how to send it."""
        rng = self._rng
        number = rng.choices(range(len(_KINDS)), self._weights)[0]
        message = self._makers[number](rng, self.aims)
        if rng.random() < 0.3:
            message.flags |= rng.choice((NO_REPLY, NO_AUTOSTART, INTERACTIVE, 0x80))
        if rng.random() < 0.1:
            message.order = ">"
        name, how = self._names[number], SendMode.WHOLE
        # Do this rarely, because each such message ends a connection.
        if (luck := rng.random()) < 0.002:
            how = SendMode.FLIPPED if luck < 0.001 else SendMode.CUT
            name = how.value
        return name, message, how

    def damage(self, raw: bytes, how: SendMode) -> bytes:
        """Return the damaged bytes."""
        if how is SendMode.CUT:
            return raw[: self._rng.randrange(1, len(raw))]
        damaged = bytearray(raw)
        for _ in range(self._rng.randint(1, 8)):
            damaged[self._rng.randrange(len(damaged))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)


def _members() -> list[tuple[str, str, str]]:
    """Return (interface, method, signature) of everything that the daemon serves."""
    found = []
    for file in sorted((TOP / "dbus").glob("org.qkilld1.*.xml")):
        for interface in ET.parse(file).iter("interface"):
            for method in interface.iter("method"):
                takes = [
                    a.get("type", "") for a in method.iter("arg") if a.get("direction") == "in"
                ]
                found.append((interface.get("name", ""), method.get("name", ""), "".join(takes)))
    return found


_MEMBERS: Final = _members()
_OPTIONS: Final = (
    *("start-time", "grace-usec", "stall-usec", "storage-stall-usec", "max-usec"),
    *("powerdown-usec", "qmp-socket", "reason", "powerdown-only", "resume", "nothing", ""),
)
_NAMES: Final = (
    *("org.qkilld1", "org.freedesktop.DBus", ":1.1", ":1.2", "org.freedesktop.PolicyKit1"),
    *("org.freedesktop.systemd1", ":1.4294967295"),
)


def _pid(rng: random.Random, aims: Aims) -> int:
    known = (*aims.own, *aims.others, 0, 1, 2**32 - 1, 2**31 - 1)
    return rng.choice(known) if rng.random() < 0.9 else rng.getrandbits(32)


def _path(rng: random.Random) -> str:
    job = rng.randint(0, 40)
    return rng.choice(
        (
            *(f"/org/qkilld1/job/{job}",) * 12,
            *(MANAGER_PATH,) * 4,
            *(f"/org/qkilld1/guest/{job}",) * 2,
            *("/", "/org", "/org/qkilld1/job", f"/org/qkilld1/job/0{job}"),
            *(f"/org/qkilld1/job/{2**64 + job}", "/org/qkilld1/job/1/2", "/a" * 400),
        )
    )


def type_of(rng: random.Random, depth: int = 3) -> str:
    """Return a random complete type."""
    luck = rng.random()
    if not depth or luck < 0.5:
        return rng.choice(_BASIC)
    if luck < 0.65:
        return "v"
    if luck < 0.8:
        return "a" + type_of(rng, depth - 1)
    if luck < 0.9:
        return "a{" + rng.choice(_BASIC) + type_of(rng, depth - 1) + "}"
    inner = "".join(type_of(rng, depth - 1) for _ in range(rng.randint(1, 4)))
    return f"({inner})"


def value_of(rng: random.Random, kind: str, depth: int = 3) -> Any:
    """Return a random value of this type that a bus considers valid."""
    first = kind[0]
    match first:
        case "b":
            return rng.getrandbits(1)
        case "d":
            return rng.uniform(-1e300, 1e300)
        case "s":
            return _text(rng)
        case "o":
            return _path(rng)
        case "g":
            return type_of(rng, 2)
        case "v":
            inner = type_of(rng, depth - 1) if depth > 0 else rng.choice(_BASIC)
            return inner, value_of(rng, inner, depth - 1)
        case "a":
            return [value_of(rng, kind[1:], depth - 1) for _ in range(rng.randint(0, 4))]
        case "(" | "{":
            values, at = [], 1
            while at < len(kind) - 1:
                end = end_of_type(kind, at)
                values.append(value_of(rng, kind[at:end], depth - 1))
                at = end
            return values
    code = _FIXED[first]
    bits = 8 * struct.calcsize(code)
    number = rng.choice((0, 1, 2 ** (bits - 1), 2**bits - 1, rng.getrandbits(bits)))
    return number - 2**bits if code.islower() and number >= 2 ** (bits - 1) else number


def _text(rng: random.Random) -> str:
    length = rng.choice((0, 1, 8, 8, 8, 300))
    letters = 'ab/.:%\\"\n\x1b[\u202e\U0001f600{}$\u00e4 \x7f'
    return "".join(rng.choice(letters) for _ in range(length))


def _valid(rng: random.Random, aims: Aims) -> Message:
    """Return a valid call, with or without permission."""
    interface, member, signature = rng.choice(_MEMBERS)
    body: list[Any] = []
    at = 0
    while at < len(signature):
        end = end_of_type(signature, at)
        kind = signature[at:end]
        at = end
        if kind == "u":
            body.append(_pid(rng, aims))
        elif kind == "t":
            body.append(rng.choice((0, 1, 2, 3, 8, 9, 16, 2**64 - 1)))
        elif kind == "a{sv}":
            body.append(_options(rng))
        else:
            body.append(value_of(rng, kind))
    path = MANAGER_PATH if interface == MANAGER else _path(rng)
    return Message(path=path, interface=interface, member=member, signature=signature, body=body)


def _options(rng: random.Random) -> list[tuple[str, tuple[str, Any]]]:
    options = []
    for _ in range(rng.choice((0, 1, 1, 2, 5, 40))):
        kind = rng.choice(("t", "t", "s", "b", type_of(rng)))
        options.append((rng.choice(_OPTIONS), (kind, value_of(rng, kind))))
    return options


def _wrong_signature(rng: random.Random, aims: Aims) -> Message:
    message = _valid(rng, aims)
    kinds = [type_of(rng) for _ in range(rng.randint(0, 6))]
    message.signature = "".join(kinds)
    message.body = [value_of(rng, kind) for kind in kinds]
    return message


def _nested(rng: random.Random, aims: Aims) -> Message:
    """Nest variants, at most as deep as a bus allows (64)."""
    message = _valid(rng, aims)
    value: Any = ("y", 1)
    for _ in range(rng.randint(1, 60)):
        value = ("v", value)
    message.signature, message.body = "v", [value]
    return message


def _many_types(rng: random.Random, aims: Aims) -> Message:
    """Return variants of structs with different types. A cache of all types would fill the
    memory."""
    message = _valid(rng, aims)
    variants = []
    for _ in range(rng.choice((1, 10, 100))):
        kinds = "".join(rng.choice("ynqiuxtb") for _ in range(rng.choice((4, 60, 250))))
        variants.append((f"({kinds})", [0] * len(kinds)))
    message.signature, message.body = "av", [variants]
    return message


def _long(rng: random.Random, aims: Aims) -> Message:
    message = _valid(rng, aims)
    message.signature, message.body = "ay", ()
    size = rng.choice((1 << 10, 1 << 14, 1 << 16, 3 << 18))
    message.raw_body = struct.pack("<I", size) + bytes(size)
    return message


def _unknown(rng: random.Random, aims: Aims) -> Message:
    message = _valid(rng, aims)
    message.interface = rng.choice((None, "org.qkilld1", MANAGER, JOB, "a.b", PROPERTIES))
    message.member = rng.choice(("Kill", "wait", "Terminate_", "m" * 255, message.member))
    message.path = _path(rng)
    return message


def _property(rng: random.Random, aims: Aims) -> Message:
    interface = rng.choice((MANAGER, JOB, GUEST, "", "org.freedesktop.DBus.Peer", "x"))
    name = rng.choice(("Version", "NJobs", "Phase", "Id", "Held", "", "x"))
    member, signature, body = rng.choice(
        (
            ("Get", "ss", [interface, name]),
            ("GetAll", "s", [interface]),
            ("Set", "ssv", [interface, name, ("u", 1)]),
            ("Set", "ss", [interface, name]),
        )
    )
    path = _path(rng)
    return Message(path=path, interface=PROPERTIES, member=member, signature=signature, body=body)


def _standard(rng: random.Random, aims: Aims) -> Message:
    interface, member = rng.choice(
        (
            ("org.freedesktop.DBus.Introspectable", "Introspect"),
            ("org.freedesktop.DBus.Peer", "Ping"),
            ("org.freedesktop.DBus.Peer", "GetMachineId"),
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
        )
    )
    return Message(path=_path(rng), interface=interface, member=member)


def _spoofed_signal(rng: random.Random, aims: Aims) -> Message:
    """Pretend to be the bus, systemd or the daemon itself."""
    interface, member, signature, body = rng.choice(
        (
            ("org.freedesktop.DBus", "NameOwnerChanged", "sss", [":1.1", ":1.1", ""]),
            ("org.freedesktop.DBus", "NameOwnerChanged", "sss", [BUS_NAME, ":1.1", ":1.2"]),
            ("org.freedesktop.DBus", "NameOwnerChanged", "u", [1]),
            ("org.freedesktop.DBus", "NameLost", "s", [BUS_NAME]),
            ("org.freedesktop.systemd1.Manager", "JobRemoved", "uoss", [1, "/", "a", "done"]),
            (MANAGER, "JobRemoved", "uous", [1, "/org/qkilld1/job/1", 1, "killed"]),
            (PROPERTIES, "PropertiesChanged", "sa{sv}as", [JOB, [], []]),
        )
    )
    return Message(
        kind=SIGNAL,
        path=rng.choice(("/org/freedesktop/DBus", MANAGER_PATH)),
        interface=interface,
        member=member,
        signature=signature,
        body=body,
        destination=rng.choice((BUS_NAME, None)),
        fields=[(_SENDER, "s", rng.choice(_NAMES))],
    )


def _spoofed_reply(rng: random.Random, aims: Aims) -> Message:
    """Reply to a call that the daemon may just have made, for example to polkit."""
    serial = rng.choice((1, 2, 3, rng.randint(1, 5000), rng.getrandbits(32) or 1))
    kind = rng.choice((RETURN, ERROR))
    fields: list[tuple[int, str, Any]] = [(_REPLY_SERIAL, "u", serial)]
    fields.append((_SENDER, "s", rng.choice(_NAMES)))
    if kind == ERROR:
        fields.append((_ERROR_NAME, "s", "org.freedesktop.DBus.Error.Failed"))
    return Message(
        kind=kind, signature="(bba{ss})", body=[[1, 0, []]], fields=fields, flags=NO_REPLY
    )


def _spoofed_sender(rng: random.Random, aims: Aims) -> Message:
    message = _valid(rng, aims)
    message.fields = [(_SENDER, "s", rng.choice(_NAMES))]
    return message


def _with_descriptors(rng: random.Random, aims: Aims) -> Message:
    message = _valid(rng, aims)
    message.descriptors = rng.randint(1, 8)
    message.signature, message.body = "ah", [list(range(message.descriptors))]
    return message


def _wait(rng: random.Random, aims: Aims) -> Message:
    path = f"/org/qkilld1/job/{rng.randint(1, 30)}"
    return Message(path=path, interface=JOB, member="Wait")


def _future_field(rng: random.Random, aims: Aims) -> Message:
    """Add unknown header fields. By the specification, they must be ignored."""
    message = _valid(rng, aims)
    message.fields = [(rng.randint(10, 255), "v", ("s", "x")), (200, "as", ["a", "b"])]
    return message


def _bus_itself(rng: random.Random, aims: Aims) -> Message:
    member, signature, body = rng.choice(
        (
            ("RequestName", "su", [BUS_NAME, 7]),
            ("RequestName", "su", ["org.freedesktop.PolicyKit1", 7]),
            ("ReleaseName", "s", [BUS_NAME]),
            ("AddMatch", "s", [f"type='signal',sender='{BUS_NAME}'"]),
            ("RemoveMatch", "s", [f"type='signal',sender='{BUS_NAME}'"]),
            ("GetConnectionUnixUser", "s", [BUS_NAME]),
        )
    )
    return Message(
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
        member=member,
        signature=signature,
        body=body,
        destination="org.freedesktop.DBus",
    )


Maker = Callable[[random.Random, Aims], Message]
_KINDS: Final[Sequence[tuple[int, str, Maker]]] = (
    (30, "valid calls", _valid),
    (10, "wrong signatures", _wrong_signature),
    (3, "nested variants", _nested),
    (3, "types never seen", _many_types),
    (1, "long bodies", _long),
    (8, "unknown members", _unknown),
    (8, "properties", _property),
    (4, "standard interfaces", _standard),
    (6, "spoofed signals", _spoofed_signal),
    (6, "spoofed replies", _spoofed_reply),
    (4, "spoofed senders", _spoofed_sender),
    (2, "descriptors", _with_descriptors),
    (10, "Waits", _wait),
    (2, "unknown header fields", _future_field),
    (3, "calls of the bus", _bus_itself),
)
KIND_NAMES: Final = (*(name for _, name, _ in _KINDS), SendMode.FLIPPED.value, SendMode.CUT.value)
