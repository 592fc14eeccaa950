"""The guest of the unit with a given name, and whether a unit stops its guests itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.engine.unit_guest import check_unit_name, choose_guest
from qkilld.model.errors import (
    Failed,
    InvalidArgs,
    NoSuchProcess,
    NoSuchUnit,
    NotQemu,
    QkilldError,
    UnknownIdentity,
)
from qkilld.model.guest import Guest, Identity, Label, Unidentified, Unit
from qkilld.model.unit import Command, UnitFacts

WEB = UnitFacts("web.service", main_pid=10, control_group="/system.slice/web.service")
OWN = replace(WEB, control_group="/user.slice/user-7.slice/user@7.service/app.slice/web.service")
SYSTEMS = Unit("web.service")
USERS = Unit("user@7.service", "web.service")


def guest(pid: int, unit: Unit | None) -> Guest:
    return Guest(Identity(pid, 1, 0, "qemu", "S", "/usr/bin/kvm", False), Label(unit=unit))


@pytest.mark.parametrize(
    ("facts", "guests", "expected"),
    [
        (WEB, [(10, SYSTEMS)], 10),
        (WEB, [(10, SYSTEMS), (11, SYSTEMS)], 10),  # the main process
        (WEB, [(11, SYSTEMS)], 11),  # a shell around it
        (replace(WEB, main_pid=0), [(11, SYSTEMS)], 11),  # a scope
        (replace(WEB, id="site.service"), [(10, Unit("site.service"))], 10),  # an alias
        (WEB, [(11, SYSTEMS), (12, USERS)], 11),  # a user's unit of this name is another unit
        (OWN, [(10, USERS)], 10),
        (None, [(12, USERS)], 12),
        (None, [(11, SYSTEMS), (12, USERS)], 11),
        # systemd and the control groups disagree about the main process.
        (WEB, [(10, Unit("db.service")), (11, SYSTEMS)], 11),
        (WEB, [(11, SYSTEMS), (12, SYSTEMS)], Failed),
        (None, [(12, USERS), (13, USERS)], Failed),
        (WEB, [(12, USERS)], NotQemu),
        (WEB, [], NotQemu),
        (WEB, [(10, Unit("db.service"))], NotQemu),
        (replace(WEB, main_pid=0, control_group=""), [], NoSuchProcess),
        (None, [], NoSuchUnit),
        # A guest whose unit is unreadable may belong to the unit with this name.
        (WEB, [(10, None), (11, SYSTEMS)], 11),
        (WEB, [(10, None)], Failed),
        (None, [(10, None)], Failed),
    ],
)
def test_the_guest_of_a_unit(
    facts: UnitFacts | None,
    guests: list[tuple[int, Unit | None]],
    expected: int | type[QkilldError],
) -> None:
    there = [guest(pid, unit) for pid, unit in guests]
    if isinstance(expected, int):
        chosen = choose_guest("web.service", facts, there, known=facts is not None)
        assert chosen.identity.pid == expected
        return
    with pytest.raises(expected) as caught:
        choose_guest("web.service", facts, there, known=facts is not None)
    if expected is Failed:
        for pid, _ in guests:
            assert str(pid) in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "guests", "unit", "expected"),
    [
        (WEB, [(10, SYSTEMS)], SYSTEMS, 10),
        (WEB, [(11, SYSTEMS)], SYSTEMS, None),  # Process 21 may be the guest.
        (WEB, [(11, SYSTEMS)], USERS, 11),
        (WEB, [(11, SYSTEMS)], None, 11),
        (WEB, [], SYSTEMS, None),
        (WEB, [], None, None),
        (OWN, [], USERS, None),
        (None, [], USERS, None),
        (None, [(11, SYSTEMS)], USERS, 11),
    ],
)
def test_a_process_of_the_unit_that_cannot_be_identified(
    facts: UnitFacts | None,
    guests: list[tuple[int, Unit | None]],
    unit: Unit | None,
    expected: int | None,
) -> None:
    there, unknown = [guest(*each) for each in guests], [Unidentified(21, 7, unit)]

    def choose() -> int:
        return choose_guest("web.service", facts, there, unknown, known=True).identity.pid

    if expected is not None:
        assert choose() == expected
        return
    with pytest.raises(UnknownIdentity, match="process 21 is a guest"):
        choose()


@pytest.mark.parametrize(
    "name", ["", "web", ".service", "a b.service", "../a.service", "a/b.scope", "web.mount"]
)
def test_impossible_unit_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgs):
        check_unit_name(name)
    with pytest.raises(InvalidArgs):
        check_unit_name(f"{name}\nx.service")
    check_unit_name(r"guest@a\x2db:c_d.service")


STOP = (Command("/usr/bin/podman", ("podman", "stop", "web")),)


@pytest.mark.parametrize(
    "facts, cares",
    [
        (UnitFacts("web.service", exec_stop=STOP), True),
        (UnitFacts("web.service"), False),
        (UnitFacts("user@1000.service", exec_stop=STOP), False),
        (UnitFacts("machine-qemu\\x2d1\\x2dweb.scope"), False),
    ],
)
def test_units_that_stop_their_own_guests(facts: UnitFacts, cares: bool) -> None:
    assert facts.cares_for_guests is cares
