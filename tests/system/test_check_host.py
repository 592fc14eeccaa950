"""qkillctl check-host on a real systemd."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.container import Container
from tests.lab.process import OTHER_UID

UNIT = "checked-host.service"
QEMU = "/usr/bin/qemu-system-x86_64"


def test_only_root_is_told_that_a_host_is_safe(installed: Container) -> None:
    """Other users cannot see the executables of all processes."""

    def check(uid: int | None) -> tuple[dict[str, Any], list[str], str]:
        done = installed.run("qkillctl", "--json", "check-host", uid=uid, check=False)
        report = json.loads(done.stdout)
        assert done.returncode == report["exit_code"]
        return report, [guest["unit"] for guest in report["guests"]], done.stderr

    def lines(uid: int | None) -> str:
        return installed.run("qkillctl", "check-host", uid=uid, check=False).stdout

    report, units, said = check(OTHER_UID)
    assert UNIT not in units
    assert (report["complete"], report["exit_code"]) == (False, 8)
    assert "run this as root" in said
    assert "No QEMU runs on this host" not in lines(OTHER_UID)

    # Every user can recognise this guest by its command line.
    guest = (QEMU, "-name", "checked", "-M", "none", "-display", "none")
    installed.run("systemd-run", f"--unit={UNIT}", "--service-type=exec", *guest)
    try:
        for uid in (None, OTHER_UID):
            report, units, said = check(uid)
            assert UNIT in units
            assert (report["complete"], report["exit_code"]) == (uid is None, 8)
            assert ("run this as root" in said) is (uid is not None)
    finally:
        installed.run("systemctl", "stop", UNIT)
