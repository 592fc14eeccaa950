"""What is said of a job that was cancelled, held, extended, …"""

from __future__ import annotations

from qkilld.ctl.control import CONTROLS
from tests.pure.test_jobview import view


def test_a_cancel_does_not_keep_the_guest_of_a_unit_from_systemd() -> None:
    told = CONTROLS["cancel"].told
    assert "systemd" not in told(view(), view())
    of_a_unit = view(Unit="web\x1b.service")
    text = told(of_a_unit, of_a_unit)
    assert "Where systemd is stopping web\ufffd.service" in text and "`hold`" in text
    assert text.isprintable()
