"""The unit names that check-unit and adopt accept."""

from __future__ import annotations

import pytest

from qkilld.ctl.check_unit import full_name
from qkilld.model.errors import InvalidArgs


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("web", "web.service"),
        ("web.service", "web.service"),
        ("guest@db", "guest@db.service"),
        ("run-1234.scope", "run-1234.scope"),
        ("vm.mountain", "vm.mountain.service"),
        ("dbus.socket.service", "dbus.socket.service"),
    ],
)
def test_full_names(name: str, full: str) -> None:
    assert full_name(name) == full


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dbus.socket", "is a socket unit"),
        ("machine.slice", "is a slice unit"),
        ("a/b.service", "not the name of a unit"),
        ("", "not the name of a unit"),
    ],
)
def test_units_of_other_kinds_are_refused(name: str, part: str) -> None:
    with pytest.raises(InvalidArgs, match=part):
        full_name(name)
