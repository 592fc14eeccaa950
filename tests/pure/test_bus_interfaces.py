"""The program has exactly the values that the XML under dbus/ describes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

from qkilld.bus import interfaces
from qkilld.bus.interfaces import Interface
from qkilld.bus.job_object import _RECEIPT_TYPES, PRIVATE
from qkilld.engine.service import OPTION_TYPES
from qkilld.model.constants import (
    AgentKind,
    Flag,
    GuestAsked,
    MonitorKind,
    NextRung,
    Phase,
    Result,
    Verdict,
)
from qkilld.model.errors import BY_BUS_NAME

DBUS = Path(__file__).parents[2] / "dbus"
EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"
ENUMERATIONS: dict[str, type[StrEnum]] = {
    "Phase": Phase,
    "Verdict": Verdict,
    "Result": Result,
    "NextRung": NextRung,
    "GuestAsked": GuestAsked,
}


def test_every_member_has_a_comment() -> None:
    for path in sorted(DBUS.glob("*.xml")):
        text = path.read_text()
        for member in re.finditer(r'\n *<(?:method|signal|property) name="(\w+)"', text):
            before = text[: member.start()].rstrip()
            assert before.endswith("-->"), f"{path.name}: {member[1]}"


def annotations_of(interface: Interface) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the annotations of each property."""
    for element in ET.fromstring(interface.xml).iterfind("property"):
        found = element.iterfind("annotation")
        yield element.attrib["name"], {a.attrib["name"]: a.attrib["value"] for a in found}


def test_enumerations() -> None:
    listed = {
        name: found["org.qkilld1.Values"].split()
        for name, found in annotations_of(interfaces.job())
        if "org.qkilld1.Values" in found
    }
    assert listed == {
        name: [value for value in words if value] for name, words in ENUMERATIONS.items()
    }


def test_flags() -> None:
    found = dict(annotations_of(interfaces.job()))["Flags"]["org.qkilld1.Flags"]
    assert found.split() == [f"{flag.value}={flag.name}" for flag in Flag]


INTERFACES = [interfaces.manager(), interfaces.job()]


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: str(interface.name))
def test_every_number_of_64_bits_has_a_unit(interface: Interface) -> None:
    for name, found in annotations_of(interface):
        if interface.properties[name] == "t" and name != "Flags":
            assert "org.qkilld1.Unit" in found, name
        if name.endswith("USec"):
            assert found["org.qkilld1.Unit"] in ("usec", "usec-monotonic")


def test_the_page_for_authors_names_everything() -> None:
    """dbus/README.md names each member, value, option, key of the receipt and error."""
    page = (Path(__file__).parents[2] / "dbus/README.md").read_text()
    named = set(re.findall(r"`([^`]+)`", page))
    enumerations: list[type[StrEnum]] = [*ENUMERATIONS.values(), MonitorKind, AgentKind]
    wanted = {word.value for enumeration in enumerations for word in enumeration if word}
    for interface in (*INTERFACES, interfaces.guest()):
        for tag in ("method", "signal", "property"):
            wanted |= {each.attrib["name"] for each in ET.fromstring(interface.xml).iterfind(tag)}
    wanted |= set(OPTION_TYPES) | set(_RECEIPT_TYPES)
    wanted |= {error.rpartition(".")[2] for error in BY_BUS_NAME}
    named |= {name.rpartition(".")[2] for name in named if name.startswith("org.")}
    assert wanted <= named, wanted - named


def test_private_properties_are_told_without_values() -> None:
    silent = [
        n for n, found in annotations_of(interfaces.job()) if found.get(EMITS) == "invalidates"
    ]
    assert sorted(silent) == sorted(PRIVATE)


def test_the_xml_is_well_formed_for_generators() -> None:
    """gdbus-codegen refuses annotations outside the element that they describe."""
    for interface in INTERFACES:
        for element in ET.fromstring(interface.xml).iter("annotation"):
            assert set(element.attrib) == {"name", "value"}
        assert "<!--" not in interface.xml
