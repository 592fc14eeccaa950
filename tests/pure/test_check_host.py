"""Who stops a guest when the host shuts down."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.unitcheck.host_shutdown import HostGuest, StoppedBy, predict_stop, shutdown_order

PLAIN: dict[str, Any] = {
    "is_covered": True,
    "cares_for_guests": False,
    "is_guarded": False,
    "keepers": (),
    "is_before": False,
    "has_unit": True,
}


@pytest.mark.parametrize(
    ("change", "stopped_by"),
    [
        ({}, StoppedBy.SYSTEMD),
        ({"is_before": True}, StoppedBy.GUESTS_SERVICE),
        ({"has_unit": False}, StoppedBy.GUESTS_SERVICE),
        ({"is_guarded": True}, StoppedBy.GUARD),
        ({"keepers": ("pve-guests.service",), "is_guarded": True}, StoppedBy.KEEPER),
        ({"cares_for_guests": True, "keepers": ("x.service",)}, StoppedBy.OWN_UNIT),
        ({"is_covered": False, "cares_for_guests": True}, StoppedBy.UNCOVERED),
    ],
)
def test_predict_stop(change: dict[str, Any], stopped_by: StoppedBy) -> None:
    assert predict_stop(**PLAIN | change) is stopped_by


def test_order_and_words() -> None:
    guests = [
        HostGuest(1, "a", "100.scope", StoppedBy.KEEPER, ("pve-guests.service",)),
        HostGuest(2, "b", "b.service", StoppedBy.OWN_UNIT),
        HostGuest(3, "", "", StoppedBy.GUESTS_SERVICE),
        HostGuest(4, "d", "d.service", StoppedBy.SYSTEMD),
    ]
    assert shutdown_order(guests) == (
        ("pve-guests.service", "b.service"),
        ("qkilld-guests.service",),
        ("100.scope", "d.service"),
    )
    assert "left to pve-guests.service" in str(guests[0])
    assert str(guests[2]).startswith("3 in no unit")
    assert "`qkillctl adopt d.service`" in str(guests[3])
