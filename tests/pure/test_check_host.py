"""Who stops a guest when the host shuts down."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.unitcheck.host_shutdown import Care, HostGuest, care_of, shutdown_order

PLAIN: dict[str, Any] = {
    "is_covered": True,
    "cares_for_guests": False,
    "is_guarded": False,
    "keepers": (),
    "is_before": False,
    "has_unit": True,
}


@pytest.mark.parametrize(
    ("change", "care"),
    [
        ({}, Care.SYSTEMD),
        ({"is_before": True}, Care.GUESTS_SERVICE),
        ({"has_unit": False}, Care.GUESTS_SERVICE),
        ({"is_guarded": True}, Care.GUARD),
        ({"keepers": ("pve-guests.service",), "is_guarded": True}, Care.KEEPER),
        ({"cares_for_guests": True, "keepers": ("x.service",)}, Care.OWN_UNIT),
        ({"is_covered": False, "cares_for_guests": True}, Care.UNCOVERED),
    ],
)
def test_care(change: dict[str, Any], care: Care) -> None:
    assert care_of(**PLAIN | change) is care


def test_order_and_words() -> None:
    guests = [
        HostGuest(1, "a", "100.scope", Care.KEEPER, ("pve-guests.service",)),
        HostGuest(2, "b", "b.service", Care.OWN_UNIT),
        HostGuest(3, "", "", Care.GUESTS_SERVICE),
        HostGuest(4, "d", "d.service", Care.SYSTEMD),
    ]
    assert shutdown_order(guests) == (
        ("pve-guests.service", "b.service"),
        ("qkilld-guests.service",),
        ("100.scope", "d.service"),
    )
    assert "left to pve-guests.service" in str(guests[0])
    assert str(guests[2]).startswith("3 in no unit")
    assert "`qkillctl adopt d.service`" in str(guests[3])
