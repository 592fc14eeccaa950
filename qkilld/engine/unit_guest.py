"""Find the guest that runs in a named unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from qkilld.model.errors import (
    Failed,
    InvalidArgs,
    NoSuchProcess,
    NoSuchUnit,
    NotQemu,
    UnknownIdentity,
)
from qkilld.model.guest import Guest, Unidentified, Unit
from qkilld.model.text import printable
from qkilld.model.unit import UnitFacts

MAX_NAMED: Final = 10
_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,247}\.(service|scope)")
"""systemd.unit(5): a name has at most 255 characters, including its suffix."""


def check_unit_name(name: str) -> None:
    """Raise InvalidArgs unless `name` can be the name of a service or scope."""
    if not _NAME.fullmatch(name):
        raise InvalidArgs(f'"{printable(name)}" is not the name of a .service or .scope')


def choose_guest(
    name: str,
    facts: UnitFacts | None,
    guests: Sequence[Guest],
    unidentified: Sequence[Unidentified] = (),
    *,
    known: bool,
) -> Guest:
    """Return the guest that runs in a unit: its main process, or else the only QEMU process in it.

    Users may choose any name for their units. So if there is a system unit of that name, units of
    user managers are ignored. A system unit counts as existing if systemd describes it, or if a
    guest runs in it.

    facts         the unit's properties; None if systemd does not answer
    unidentified  processes that may be QEMU
    known         False if systemd says that there is no such unit

    Raises NoSuchUnit, NoSuchProcess, NotQemu. Raises UnknownIdentity if an unidentified process may
    be the guest. Raises Failed if there are several guests, or if none is found and the unit of
    some QEMU is unreadable.
    """
    primary = facts.id if facts is not None else name
    inside = [guest for guest in guests if guest.label.unit_name == primary]
    of_system = [guest for guest in inside if guest.label.unit == Unit(primary)]
    of_users = not of_system and (facts is None or "/user@" in facts.control_group)
    if not of_users:
        inside = of_system
    if facts is not None:
        for guest in inside:
            if guest.identity.pid == facts.main_pid:
                return guest
    unknown = [
        each.pid
        for each in unidentified
        if (not inside if each.unit is None else each.unit.name == primary)
        and (of_users or each.unit in (None, Unit(primary)))
    ]
    if unknown:
        raise UnknownIdentity(
            f"Cannot tell whether process {_pids(unknown)} is a guest in {primary}: the kernel does"
            " not show its executable at the moment. Try again later"
        )
    if len(inside) == 1:
        return inside[0]
    if inside:
        named = _pids([guest.identity.pid for guest in inside])
        raise Failed(
            f"{primary} has {len(inside)} QEMU processes, and none is its main process: name one "
            f"by its process id, as in `qkillctl terminate PID`. They are {named}"
        )
    if hidden := [guest.identity.pid for guest in guests if guest.label.unit is None]:
        raise Failed(
            f"No QEMU is known to run in {primary}, but the unit of process {_pids(hidden)} cannot "
            "be read"
        )
    if not known:
        raise NoSuchUnit(f'systemd knows no unit "{name}", and no QEMU runs in one of that name')
    if facts is None:
        raise NoSuchUnit(
            f'No QEMU runs in a unit "{name}", and systemd does not say whether the unit exists'
        )
    if not facts.control_group:
        raise NoSuchProcess(f"{primary} is not running")
    raise NotQemu(f"No QEMU runs in {primary}")


def _pids(pids: Sequence[int]) -> str:
    return " ".join(map(str, pids[:MAX_NAMED])) + (" …" if len(pids) > MAX_NAMED else "")
