"""A bus whose policy does not know qkilld, as if the policy file were not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.lab import bus as lab_bus
from tests.lab import needs
from tests.lab.process import OTHER_UID, run

POLICY_FILE = "/usr/share/dbus-1/system.d/org.qkilld1.conf"
AS_ANOTHER = ["setpriv", f"--reuid={OTHER_UID}", f"--regid={OTHER_UID}", "--clear-groups"]
MAY_READ = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]


def program(
    bus: lab_bus.Bus, module: str, *arguments: str, uid: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module with this bus as the system bus."""
    prefix = []
    if uid is not None:
        needs.root("to be another user")
        prefix = [*AS_ANOTHER, *MAY_READ]
    argv = [*prefix, sys.executable, "-m", module, *arguments]
    return run(argv, env=lab_bus.environment(bus.address))


@pytest.mark.parametrize("uid", [None, OTHER_UID])
def test_a_daemon_that_may_not_own_its_name(uid: int | None) -> None:
    with lab_bus.private_bus(policy='<deny own="org.qkilld1"/>') as bus:
        done = program(bus, "qkilld", uid=uid)
        private = program(bus, "qkilld", "--bus", bus.address, uid=uid)
    assert done.returncode == private.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "error: " not in line]
    line, *others = lines
    # A checkout has no system files, which is reported, too.
    missing = "qkilld: These system files are missing: the policy of the bus"
    assert [one.partition(" (")[0] for one in others] in ([], [missing]), done.stderr
    own_uid = os.getuid() if uid is None else uid
    assert line.startswith("qkilld: the system bus does not let uid ") and f"uid {own_uid}" in line
    assert (POLICY_FILE in line) is (own_uid == 0)
    assert ("as root" in line) is (own_uid != 0)
    assert POLICY_FILE not in private.stderr and "its policy" in private.stderr


def test_a_client_that_may_not_call() -> None:
    with (
        lab_bus.private_bus(policy='<deny send_destination="org.qkilld1"/>') as bus,
        lab_bus.daemon(bus),
    ):
        done = program(bus, "qkilld.ctl", "list")
    assert done.returncode == 6
    assert "the policy of the bus does not allow" in done.stderr and POLICY_FILE in done.stderr
    assert "as root" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
