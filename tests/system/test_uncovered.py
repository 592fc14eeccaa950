"""QEMUs that qkilld ignores, because they do not match Executables=."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.evidence.until import until
from tests.lab.container import CHECKOUT, Container
from tests.lab.image import busybox
from tests.lab.process import TOP

PLACE = "/home/linuxbrew/.linuxbrew/Cellar/qemu/9.0/bin/qemu-system-x86_64"
UNIT = "brew.service"
CONF = "/etc/qkilld/qkilld.conf.d/brew.conf"


@pytest.fixture
def unit(installed: Container) -> Iterator[str]:
    installed.run("mkdir", "-p", PLACE.rpartition("/")[0])
    installed.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", PLACE)
    command = f"@{PLACE} busybox sh -c 'while true; do sleep 1000; done' -name brewed"
    text = f"[Service]\nExecStart={command}\nKillMode=mixed\n"
    installed.write(f"/etc/systemd/system/{UNIT}", text)
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "start", "qkilld.service", UNIT)
    try:
        yield UNIT
    finally:
        installed.run("systemctl", "stop", UNIT, "qkilld.service")
        installed.run("rm", "-rf", f"/etc/systemd/system/{UNIT}", "/home/linuxbrew", CONF)
        installed.run("systemctl", "daemon-reload")


def test_it_is_shown_with_the_line_that_covers_it(installed: Container, unit: str) -> None:
    pid = int(until(lambda: installed.property(unit, "MainPID"), lambda text: text != "0"))
    text = installed.run("qkillctl", "list").stdout
    assert "Executables= does not cover these" in text
    row = next(line for line in text.splitlines() if line.startswith(f"{pid} "))
    assert unit in row and PLACE in row
    assert text.splitlines()[-1].startswith("  Executables=/usr/bin/qemu-system-* ")
    (found,) = [
        row for row in json.loads(installed.run("qkillctl", "--json", "list").stdout)
        if row["pid"] == pid
    ]  # fmt: skip
    assert (found["covered"], found["unit"], found["executable"]) == (False, unit, PLACE)
    # check-unit without a name also checks the units of such guests.
    done = installed.run("qkillctl", "check-unit", check=False)
    assert done.returncode == 8 and f"{unit}: Executables= does not cover its guest" in done.stdout
    # The suggested line works.
    installed.write(CONF, f"[Target]\n{found['line']}\n")
    installed.run("systemctl", "restart", "qkilld.service")
    (found,) = [
        row for row in json.loads(installed.run("qkillctl", "--json", "list").stdout)
        if row["pid"] == pid
    ]  # fmt: skip
    assert found["covered"] is True
    assert "does not cover" not in installed.run("qkillctl", "list").stdout
    installed.run("rm", CONF)
    installed.run("systemctl", "restart", "qkilld.service")


def test_a_user_sees_those_of_others_not(installed: Container, unit: str) -> None:
    """The kernel hides the executables of other users' processes from a user, and qkillctl does not
    guess."""
    done = installed.run("qkillctl", "--json", "list", uid=65534)
    assert not [row for row in json.loads(done.stdout) if row["unit"] == unit]
