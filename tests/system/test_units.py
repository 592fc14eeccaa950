"""The installed units, on a real systemd."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.evidence.until import until
from tests.lab.container import CHECKOUT, Container
from tests.lab.image import busybox
from tests.lab.process import OTHER_UID, TOP

INSTANCES = {"qemu-guest@": "web", "qkilld-scope@": "dbus.service"}
"""An instance of each template. `verify` cannot load a scope, so another unit takes the place of
the guarded scope."""
QEMU = "-machine none\n-nodefaults\n"
QEMU_COMMAND = ("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none")


@pytest.fixture
def system(installed: Container) -> Iterator[Container]:
    """A system that runs the daemon and has a guest file `web`."""
    # The guest is asked first, although its QEMU has no machine that could react.
    drop_in = "/etc/qkilld/qkilld.conf.d/units.conf"
    installed.write(drop_in, "[Policy]\nPowerdownSec=2s\n")
    installed.run("systemctl", "restart", "qkilld.service")
    # Create the group, because otherwise only udev's package creates it.
    installed.run("groupadd", "--system", "--force", "kvm")
    text = f"# A guest.\n{QEMU}-name web one,debug-threads=on\n"
    installed.write("/etc/qkilld/guests/web.conf", text)
    yield installed
    installed.run("systemctl", "stop", "qemu-guest@web.service", check=False)
    installed.run("rm", drop_in)
    installed.run("systemctl", "restart", "qkilld.service")


@pytest.mark.parametrize("manager", ["system", "user"])
def test_systemd_finds_nothing_wrong_with_them(installed: Container, manager: str) -> None:
    files = installed.run("cat", "/usr/lib/qkilld/installed-files").stdout.splitlines()
    names = [
        path.rpartition("/")[2].replace("@.service", f"@{instance}.service")
        for path in files
        if path.endswith(".service") and f"/systemd/{manager}/" in path
        for instance in [INSTANCES.get(path.rpartition("/")[2].removesuffix(".service"), "")]
    ]
    assert "qkilld-guests.service" in names
    installed.run("mkdir", "-p", "/run/lab-user")
    done = installed.run(
        *("systemd-analyze", f"--{manager}", "--man=no", "verify", *names),
        env={"XDG_RUNTIME_DIR": "/run/lab-user"},
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("unit", ["qkilld-guests.service", "qkilld-scope@dbus.service.service"])
def test_what_network_storage_needs_is_stopped_later(installed: Container, unit: str) -> None:
    """A mount with nofail is not ordered before remote-fs.target. It stays mounted while a guest
    uses it, but needs the network and its initiator."""
    after = installed.property(unit, "After").split()
    assert {"network.target", "remote-fs-pre.target", "remote-fs.target"} <= set(after)


def test_a_guest_runs_from_its_file(system: Container) -> None:
    unit = "qemu-guest@web.service"
    system.run("systemctl", "start", unit)
    pid = system.property(unit, "MainPID")
    # The QMP socket has the path in the manual page, and QEMU answers.
    script = (
        "import json, socket, time\n"
        "end = time.monotonic() + 30\n"
        "while True:\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(30)\n"
        "    try: s.connect('/run/qemu-guest/web/qmp'); break\n"
        "    except OSError:\n"
        "        if time.monotonic() > end: raise\n"
        "    time.sleep(0.05)\n"
        "print(json.loads(s.makefile().readline())['QMP']['version']['qemu']['major'])\n"
    )
    assert int(system.python("-c", script).stdout) >= 7
    # The main process is QEMU itself, with a user of its own.
    assert system.run("cat", f"/proc/{pid}/comm").stdout == "qemu-system-x86\n"
    listed = json.loads(system.run("qkillctl", "--json", "list").stdout)
    (guest,) = [one for one in listed if one["pid"] == int(pid)]
    assert (guest["name"], guest["unit"]) == ("web one", unit)
    assert system.run("stat", "-c", "%u", f"/proc/{pid}").stdout != "0\n"
    # qkilld can be started while the unit is being stopped.
    system.run("systemctl", "stop", "qkilld.service")
    system.run("systemctl", "stop", unit)
    assert system.property(unit, "ActiveState") == "inactive"  # and not failed
    receipt = system.wait_journal(f"OBJECT_SYSTEMD_UNIT={unit}", "QKILLD_RESULT=exited")
    assert receipt["SYSLOG_IDENTIFIER"] == "qkilld"
    assert receipt["QKILLD_GUEST"] == "web one"
    assert system.run("ls", "/run/qemu-guest", check=False).stdout == ""


def test_a_wrong_guest_file_is_told_with_its_line(system: Container) -> None:
    system.write("/etc/qkilld/guests/wrong.conf", f"{QEMU}drive file=x\n-daemonize\n")
    system.run("systemctl", "start", "qemu-guest@wrong.service", check=False)
    matches = ("_SYSTEMD_UNIT=qemu-guest@wrong.service", "_TRANSPORT=stdout")
    system.wait_journal(*matches, "--grep=daemonize")
    entries = system.journal(*matches)
    assert [entry["MESSAGE"] for entry in entries] == [
        'qemu-guest: /etc/qkilld/guests/wrong.conf:3: "drive" is not an option: each line begins '
        "with an option of QEMU, with its dash",
        "/etc/qkilld/guests/wrong.conf:4: leave -daemonize out: QEMU must stay in the foreground",
    ]


def test_nobody_stops_all_guests_by_mistake(installed: Container) -> None:
    installed.run("systemctl", "start", "qkilld-guests.service")
    for verb in ("stop", "restart"):
        done = installed.run("systemctl", verb, "qkilld-guests.service", check=False)
        assert "may be requested by dependency only" in done.stderr
    assert installed.property("qkilld-guests.service", "ActiveState") == "active"


def test_a_host_with_more_guests_than_a_service_may_open_files(system: Container) -> None:
    """By default, systemd sets the soft limit of open files to 1,024."""
    guest, guests = "/usr/local/bin/qemu-system-many", "lab-many.service"
    system.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", guest)
    script = f"for n in $$(seq 80); do exec -a busybox {guest} sleep 600 & done; wait"
    limit = "[Service]\nLimitNOFILE=64:4096\n"
    text = system.run("cat", "/usr/lib/systemd/system/qkilld-guests.service").stdout
    stopper = "lab-stopper.service"
    system.write(f"/run/systemd/system/{stopper}", text.replace("RefuseManualStop=yes\n", ""))
    system.write(f"/run/systemd/system/{stopper}.d/limit.conf", limit)
    system.run("systemctl", "daemon-reload")
    try:
        system.run("systemctl", "start", stopper)
        system.run("systemd-run", f"--unit={guests}", "bash", "-c", script)
        count = ("sh", "-c", "pgrep -cx qemu-system-man || true")
        until(lambda: int(system.run(*count).stdout), lambda number: number >= 80)
        system.run("systemctl", "stop", stopper, timeout=120)
        assert system.property(stopper, "Result") == "success"
        assert int(system.run(*count).stdout) == 0
    finally:
        system.run("systemctl", "kill", "--signal=KILL", guests, check=False)
        system.run("rm", "-r", f"/run/systemd/system/{stopper}", f"/run/systemd/system/{stopper}.d")
        system.run("systemctl", "daemon-reload")


def test_the_guard_of_a_scope_is_stopped_before_it(system: Container) -> None:
    # The name contains a character that needs an escape in unit names.
    scope = r"lab-guarded\x2done.scope"
    guard = f"qkilld-scope@{scope}.service"
    run = ("systemd-run", "--scope", f"--unit={scope}")
    with system.spawn(*run, *QEMU_COMMAND, "-name", "guarded") as process:
        assert process.stdout is not None
        process.stdout.readline()  # Running scope as unit: ...
        system.run("systemctl", "start", guard)
        assert system.property(guard, "ActiveState") == "active"
        system.run("systemctl", "stop", scope)
        process.wait(30)
    system.run("systemctl", "stop", guard)  # returns when it has been stopped
    receipt = system.wait_journal("QKILLD_GUEST=guarded", "QKILLD_RESULT=exited")
    assert receipt["OBJECT_SYSTEMD_UNIT"] == scope
    # The guard was stopped with the scope, and has not failed.
    assert system.property(guard, "ActiveState") == "inactive"


def test_guests_of_a_user_are_stopped_when_the_users_manager_ends(system: Container) -> None:
    manager = f"user@{OTHER_UID}.service"
    system.run("systemctl", "start", manager)
    own = {"XDG_RUNTIME_DIR": f"/run/user/{OTHER_UID}", "HOME": "/tmp"}
    system.run("systemctl", "--user", "start", "qkilld-guests.service", uid=OTHER_UID, env=own)
    scope = ("systemd-run", "--user", "--scope", "--unit=lab-users.scope")
    with system.spawn(*scope, *QEMU_COMMAND, "-name", "in-a-scope", uid=OTHER_UID, env=own) as one:
        assert one.stdout is not None
        one.stdout.readline()  # Running scope as unit: ...
        system.run("systemctl", "stop", manager)
        one.wait(30)
    receipt = system.wait_journal("QKILLD_GUEST=in-a-scope", "QKILLD_RESULT=exited")
    assert receipt["OBJECT_SYSTEMD_USER_UNIT"] == "lab-users.scope"
