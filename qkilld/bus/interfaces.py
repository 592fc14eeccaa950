"""The interfaces, parsed from the XML files under dbus/, which are the source of truth.

Expat parses them, because ElementTree would take half a megabyte of memory, which is locked while
jobs run.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final
from xml.parsers import expat

from qkilld.model.constants import GUEST_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import ConfigError

# The directory of the XML files in an installed qkilld, and in a checkout.
_DIRECTORIES: Final = (Path(__file__).parents[1] / "interfaces", Path(__file__).parents[2] / "dbus")

_STANDARD: Final = """
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
    <method name="Ping"/>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface" type="s" direction="in"/>
      <arg name="property" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/>
      <arg name="changed" type="a{sv}"/>
      <arg name="invalidated" type="as"/>
    </signal>
  </interface>
"""


_COMMENT: Final = re.compile(r"\s*<!--.*?-->", re.DOTALL)
_Arguments = list[dict[str, str]]
"""The attributes of each argument of one member."""

OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
OBJECT_MANAGER_GIVES: Final = "a{oa{sa{sv}}}"
_OBJECT_MANAGER_XML: Final = f"""
<interface name="{OBJECT_MANAGER}">
  <method name="GetManagedObjects">
    <arg name="objects" type="{OBJECT_MANAGER_GIVES}" direction="out"/>
  </method>
  <signal name="InterfacesAdded">
    <arg name="object" type="o"/>
    <arg name="interfaces" type="a{{sa{{sv}}}}"/>
  </signal>
  <signal name="InterfacesRemoved">
    <arg name="object" type="o"/>
    <arg name="interfaces" type="as"/>
  </signal>
</interface>
"""


@dataclass(frozen=True, slots=True)
class Signature:
    """The D-Bus types of a method."""

    takes: str
    gives: str
    shown: str
    """The arguments with their names, such as `u pid, t flags`, for error messages."""


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    xml: str
    """The element of the interface, without comments."""
    methods: dict[str, Signature]
    signals: dict[str, str]
    """Name to type string."""
    properties: dict[str, str]
    """Name to type string."""


@cache
def manager() -> Interface:
    return _load(MANAGER_INTERFACE)


@cache
def job() -> Interface:
    return _load(JOB_INTERFACE)


@cache
def guest() -> Interface:
    return _load(GUEST_INTERFACE)


def load() -> None:
    """Parse the files now: an upgrade or removal may change or delete them while the daemon runs.

    Raises ConfigError.
    """
    wanted = ((MANAGER_INTERFACE, manager), (JOB_INTERFACE, job), (GUEST_INTERFACE, guest))
    for name, read in wanted:
        try:
            read()
        except (OSError, ValueError, expat.ExpatError, LookupError) as error:
            raise ConfigError(
                f"the description of {name} cannot be read: {error}; install qkilld anew"
            ) from None


def introspection(interface: Interface | None, children: list[str]) -> str:
    """Return the reply of Introspect for an object with this interface and these child nodes."""
    described = [_STANDARD]
    if interface is not None:
        described.append(interface.xml)
        if interface.name == MANAGER_INTERFACE:
            described.append(_OBJECT_MANAGER_XML)
    described += [f'<node name="{child}"/>' for child in children]
    return f"<node>{''.join(described)}</node>"


def _load(name: str) -> Interface:
    file = f"{name}.xml"
    path = next((p for d in _DIRECTORIES if (p := d / file).exists()), _DIRECTORIES[0] / file)
    text = path.read_text("utf-8")
    members = _members_of(text)
    if (name, "interface") not in members:
        raise LookupError(f"{path} does not contain it")
    of_kind: dict[str, dict[str, _Arguments]] = {"method": {}, "signal": {}, "property": {}}
    for (member, kind), arguments in members.items():
        of_kind.setdefault(kind, {})[member] = arguments
    return Interface(
        name,
        _COMMENT.sub("", text[text.index("<interface") : text.index("</node>")]),
        methods={member: _signature(args) for member, args in of_kind["method"].items()},
        signals={
            member: "".join(arg["type"] for arg in args)
            for member, args in of_kind["signal"].items()
        },
        properties={member: args[0]["type"] for member, args in of_kind["property"].items()},
    )


def _members_of(text: str) -> dict[tuple[str, str], _Arguments]:
    """Map the name and kind of each member to the attributes of its arguments. A property is mapped
    to its own attributes."""
    members: dict[tuple[str, str], _Arguments] = {}
    last: _Arguments = []

    def begin(kind: str, attributes: dict[str, str]) -> None:
        nonlocal last
        if kind == "arg":
            last.append(attributes)
        elif kind in ("interface", "method", "signal", "property"):
            last = [attributes] if kind == "property" else []
            members[attributes["name"], kind] = last

    parser = expat.ParserCreate()
    parser.StartElementHandler = begin
    parser.Parse(text, True)
    return members


def _signature(arguments: _Arguments) -> Signature:
    takes = [arg for arg in arguments if arg.get("direction") != "out"]
    return Signature(
        "".join(arg["type"] for arg in takes),
        "".join(arg["type"] for arg in arguments if arg.get("direction") == "out"),
        ", ".join(f"{arg['type']} {arg['name']}" for arg in takes),
    )
