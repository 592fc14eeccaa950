"""Messages about jobs that were cancelled, held, extended, …"""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.ctl.control import JOB_COMMANDS
from tests.pure.test_job_status import JOB


@pytest.mark.parametrize(
    ("phase", "asked", "text"),
    [
        ("powerdown", "not-asked", "cancelled: no signal will be sent"),
        ("powerdown", "asked", "no signal will be sent. The guest was asked, and may still"),
        ("quit", "ignored", "cancelled: no signal will be sent"),
        ("terminate", "ignored", "no more signals will be sent. The guest may still exit"),
    ],
)
def test_a_cancel_says_what_the_guest_may_still_do(phase: str, asked: str, text: str) -> None:
    job = replace(JOB, phase=phase, guest_asked=asked)
    assert text in JOB_COMMANDS["cancel"].report(job, job)


def test_a_cancel_does_not_keep_the_guest_of_a_unit_from_systemd() -> None:
    report = JOB_COMMANDS["cancel"].report
    assert "systemd" not in report(JOB, JOB)
    of_a_unit = replace(JOB, unit="web\x1b.service")
    text = report(of_a_unit, of_a_unit)
    assert "If systemd is stopping web\ufffd.service" in text and "`hold`" in text
    assert text.isprintable()
