"""Messages about jobs that were cancelled, held, extended, …"""

from __future__ import annotations

from dataclasses import replace

from qkilld.ctl.control import JOB_COMMANDS
from tests.pure.test_job_status import JOB


def test_a_cancel_does_not_keep_the_guest_of_a_unit_from_systemd() -> None:
    report = JOB_COMMANDS["cancel"].report
    assert "systemd" not in report(JOB, JOB)
    of_a_unit = replace(JOB, unit="web\x1b.service")
    text = report(of_a_unit, of_a_unit)
    assert "If systemd is stopping web\ufffd.service" in text and "`hold`" in text
    assert text.isprintable()
