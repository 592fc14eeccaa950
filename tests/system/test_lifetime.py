"""How long the service runs. Units that are stopped early in a shutdown must not stop the service,
too."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest

from tests.lab import container as lab_container
from tests.lab.container import Container
from tests.lab.log import Log
from tests.lab.process import wait_gone

UNITS = ("qkilld.service", "qkilld.socket", "qkilld-diag.socket")
LISTING = r"""
import json, subprocess, sys
needed, queue = {}, sys.argv[1:]
while queue:
    unit = queue.pop()
    shown = subprocess.run(
        ["systemctl", "show", "--property=Requires,Requisite,BindsTo,PartOf,ConsistsOf,Conflicts",
         "--", unit], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = dict(line.split("=", 1) for line in shown.splitlines())
    needed[unit] = found["Conflicts"].split()
    for kind in ("Requires", "Requisite", "BindsTo", "PartOf"):
        queue += [other for other in found.get(kind, "").split() if other not in needed]
print(json.dumps(needed))
"""


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_that_it_requires_is_stopped_by_a_shutdown(installed: Container, unit: str) -> None:
    needed = json.loads(installed.python("-c", LISTING, unit).stdout)
    assert unit in needed
    for name, conflicts in needed.items():
        assert "shutdown.target" not in conflicts, f"{name} of {sorted(needed)}"


def test_an_indirect_default_dependency_is_found(installed: Container) -> None:
    """The listing contains a unit with default dependencies if qkilld.service requires it
    indirectly."""
    drop_in = "/run/systemd/system/qkilld.service.d/needs.conf"
    installed.write("/run/systemd/system/far.service", "[Service]\nExecStart=/bin/true\n")
    near = "[Unit]\nDefaultDependencies=no\nRequires=far.service\n[Service]\nExecStart=/bin/true\n"
    installed.write("/run/systemd/system/near.service", near)
    installed.write(drop_in, "[Unit]\nRequires=near.service\n")
    installed.run("systemctl", "daemon-reload")
    try:
        needed = json.loads(installed.python("-c", LISTING, "qkilld.service").stdout)
    finally:
        installed.run("rm", drop_in)
        installed.run("systemctl", "daemon-reload")
    assert "shutdown.target" in needed["far.service"]


def test_the_socket_is_there_without_being_enabled(installed: Container) -> None:
    installed.run("systemctl", "stop", "qkilld.service")
    installed.run("systemctl", "start", "sockets.target")
    assert installed.property("qkilld.socket", "SubState") in ("listening", "running")
    script = (
        "import json, socket\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('/run/qkilld/org.qkilld1')\n"
        "s.sendall(json.dumps({'method': 'org.qkilld1.GetStatus'}).encode() + b'\\0')\n"
        "print(s.recv(65536).rstrip(b'\\0').decode())\n"
    )
    # Any user may connect, and this starts the service.
    replied = json.loads(installed.run("python3", "-c", script, uid=65534).stdout)
    assert replied["parameters"]["jobs"] == 0
    assert installed.property("qkilld.service", "ActiveState") == "active"
    mode = installed.run("stat", "--format=%a %U", "/run/qkilld", "/run/qkilld/jobs").stdout
    assert mode.splitlines() == ["755 root", "700 root"]


# LATE has no default dependencies. With them, it would be ordered after basic.target, which is
# ordered after dbus.socket, which is ordered after LATE. Because of this cycle, systemd would drop
# one of the stops.
LATE = """\
[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
After=linger.service
[Service]
ExecStart=/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none -name late
ExecStop=/usr/bin/qkilld-stop
NotifyAccess=exec
"""
LINGER = """\
[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sleep 2
"""
"""This unit delays the end of the shutdown until the guest is stopped, because journalctl --follow
gets an entry 250 ms late."""
KILLER = """\
[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
After=late.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/usr/bin/systemctl kill --signal=KILL qkilld.service
"""
"""This unit is stopped before the guest."""
MOUNT = "[Mount]\nWhat=tmpfs\nWhere=/var\nType=tmpfs\n"


@pytest.mark.parametrize("case", ["not running", "killed"])
def test_a_guest_that_is_stopped_when_the_bus_has_gone(lab_dir: Path, case: str) -> None:
    """During a poweroff, the helper's call starts the daemon. Before this call, the daemon has not
    run, or it was killed."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(lab_container.boot())
        # Do not run from the checkout, because its mount is unmounted early.
        lab_container.install(host, "PYTHON=/usr/bin/python3")
        units = {"late.service": LATE, "linger.service": LINGER, "var.mount": MOUNT}
        if case == "killed":
            units["killer.service"] = KILLER
        for name, text in units.items():
            host.write(f"/run/systemd/system/{name}", text)
        # A unit that is ordered after another one is stopped before it.
        for name in ("dbus.service", "dbus.socket"):
            host.write(f"/run/systemd/system/{name}.d/late.conf", "[Unit]\nAfter=late.service\n")
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "start", "qkilld.socket", *units)
        action = "stop" if case == "not running" else "start"
        host.run("systemctl", action, "qkilld.service")
        journal = Log(lab_dir / "journal")
        with journal.path.open("wb") as file:
            follow = ("setsid", "--fork", "journalctl", "--follow", "--lines=all")
            with host.spawn(*follow, stdout=file) as started:
                started.wait(30)
        leader = os.pidfd_open(host.leader)
        stack.callback(os.close, leader)
        host.run("systemctl", "--no-block", "poweroff")
        assert wait_gone(leader, 120), f"it is still up:\n{journal.text()}"
    said = journal.text()
    _, gone, late = said.partition("Stopped dbus.service")
    assert gone, said
    assert re.search(r'Stopping guest "late" \(process \d+\) .*"ExecStop of late.service"', late), (
        said
    )
    assert re.search(r'Guest "late" \(process \d+\) exited after', late), said
    assert "qkilld-stop stops guest" not in late, said
