"""The interfaces, parsed from the XML files under dbus/, which are the source of truth."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path
from typing import Final

from qkilld.model.constants import GUEST_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import ConfigError

_DIRECTORIES: Final = (
    Path(__file__).parents[1] / "interfaces",  # installed
    Path(__file__).parents[2] / "dbus",  # in a checkout
)

_STANDARD: Final = """
<node>
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
</node>
"""


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
    """The arguments with their names, for error messages: `u pid, t flags`."""


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    element: ET.Element
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
    """Parse the files now, because an upgrade or removal may replace them while the daemon runs.

    Raises ConfigError.
    """
    wanted = ((MANAGER_INTERFACE, manager), (JOB_INTERFACE, job), (GUEST_INTERFACE, guest))
    for name, read in wanted:
        try:
            read()
        except (OSError, ET.ParseError, LookupError) as error:
            raise ConfigError(
                f"the description of {name} cannot be read: {error}; install qkilld anew"
            ) from None


def introspection(interface: Interface | None, children: list[str]) -> str:
    """Return the XML that Introspect answers for an object with this interface and these child
    nodes."""
    node = ET.fromstring(_STANDARD)
    if interface is not None:
        node.append(interface.element)
        if interface.name == MANAGER_INTERFACE:
            node.append(ET.fromstring(_OBJECT_MANAGER_XML))
    for child in children:
        ET.SubElement(node, "node", name=child)
    return ET.tostring(node, encoding="unicode")


def _load(name: str) -> Interface:
    file = f"{name}.xml"
    path = next((p for d in _DIRECTORIES if (p := d / file).exists()), _DIRECTORIES[0] / file)
    element = ET.parse(path).getroot().find(f"interface[@name='{name}']")
    if element is None:
        raise LookupError(f"{path} does not contain it")
    return Interface(
        name,
        element,
        methods={m.attrib["name"]: _signature(m) for m in element.iterfind("method")},
        signals={
            s.attrib["name"]: "".join(a.attrib["type"] for a in s.iterfind("arg"))
            for s in element.iterfind("signal")
        },
        properties={p.attrib["name"]: p.attrib["type"] for p in element.iterfind("property")},
    )


def _signature(method: ET.Element) -> Signature:
    takes = [a for a in method.iterfind("arg") if a.get("direction") != "out"]
    gives = [a for a in method.iterfind("arg") if a.get("direction") == "out"]
    return Signature(
        "".join(a.attrib["type"] for a in takes),
        "".join(a.attrib["type"] for a in gives),
        ", ".join(f"{a.attrib['type']} {a.attrib['name']}" for a in takes),
    )
