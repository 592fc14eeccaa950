"""Who stops a guest when the host shuts down."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qkilld.ctl.check_host import as_json
from qkilld.ctl.check_unit import UnitReport
from qkilld.model.constants import INFINITY, ExitCode
from qkilld.unitcheck.check import check
from qkilld.unitcheck.host_shutdown import (
    HostGuest,
    HostReport,
    StoppedBy,
    predict_stop,
    shutdown_order,
)
from qkilld.unitcheck.keepers import GuestKeeper
from tests.lab.process import TOP
from tests.pure.test_comparison import BARE, MUTE, judge

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


def test_the_keys_of_json_are_the_documented_ones() -> None:
    keepers = tuple(
        GuestKeeper("pve-guests.service", "Proxmox VE", timeout) for timeout in (INFINITY, 5)
    )
    guest = HostGuest(1, "a", "100.scope", StoppedBy.KEEPER, ("pve-guests.service",))
    document = as_json(HostReport(True, keepers, (guest,)), ExitCode.OK)
    keeper = {"unit": "pve-guests.service", "project": "Proxmox VE"}
    assert document["keepers"] == [{**keeper, "timeout_usec": usec} for usec in (None, 5)]
    assert (document["guests"][0]["stopped_by"], document["guests"][0]["line"]) == ("keeper", "")
    unit = UnitReport(BARE, BARE.id, MUTE, check(BARE, MUTE), (), judge(BARE)).as_json()
    assert unit["findings"][0]["problem"] and unit["findings"][0]["reason"]
    assert unit["verdict_reason"]
    said = (TOP / "packaging/man/qkillctl.1").read_text().partition(".SH JSON")[2]
    for each in (document, *document["keepers"], *document["guests"], unit, *unit["findings"]):
        assert not [key for key in each if not re.search(rf"\b{key}\b", said)]
