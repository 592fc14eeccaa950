"""The Debian package in a clean system: installed, used, upgraded during a job, removed, purged."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.distros.trees import Release, tree
from tests.lab import container
from tests.lab.container import CHECKOUT, Container
from tests.lab.process import TOP

NEEDED: Final = (
    *("default-dbus-system-bus", "python3", "python3-dbus-next", "python3-dbus-fast"),
    *("python3-psutil", "python3-rich", "python3-systemd", "polkitd"),
    *("qemu-system-x86", "qemu-utils", "dbus-broker", "autopkgtest", "dpkg-dev"),
)
"""The packages that must be available to apt without a network."""

MANAGER: Final = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
JOB: Final = "org.qkilld1.Job"
STUBBORN: Final = """\
[Service]
ExecStart=/usr/local/bin/qemu-system-x86_64 -c \
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); \
    open('/run/stubborn', 'w').close(); time.sleep(600)" \
    -name stubborn
"""
GUEST: Final = """\
[Service]
ExecStart=/usr/bin/qemu-system-x86_64 -name %p -M none -nodefaults -display none
ExecStopPost=/bin/sh -c 'echo $EXIT_CODE $EXIT_STATUS >/run/%p.end'
"""


def run(release: Release, deb: Path) -> Iterator[str]:
    """Run all steps in a container; yield the output of each. Raises AssertionError."""
    root = tree(release, NEEDED, install=False)
    newer = _newer(deb)
    with contextlib.ExitStack() as stack:
        stack.callback(newer.unlink)
        system = stack.enter_context(container.boot(root, unified=release.unified))
        # Services are started here as on any system.
        system.run("rm", "-f", "/usr/sbin/policy-rc.d")
        _apt(
            system,
            "install",
            _inside(deb),
            *("qemu-system-x86", "qemu-utils", "autopkgtest", "dpkg-dev"),
        )
        version = system.run("systemctl", "--version").stdout.split()[1]
        yield f"installed on systemd {version}"
        _nothing_enabled(system)
        yield "started nothing but a socket"
        _autopkgtest(system)
        yield "stopped a unit by systemctl and a guest by busctl, under autopkgtest"
        if int(version) >= 255:
            _varlinkctl(system)
            yield "described itself to varlinkctl, which stopped a guest and showed each state"
        _upgrade(system, newer)
        yield "went on with a job during an upgrade"
        _remove(system)
        yield "took its drop-ins back; a unit that still names the helper stops"
        _apt(system, "purge", "qkilld")
        leftovers = _left(system)
        assert not leftovers, f"purged, but these are left: {leftovers}"
        yield "left nothing"


def _autopkgtest(system: Container) -> None:
    """Run the package's own tests. One of them requires a machine of its own; this container serves
    as one."""
    system.run("mkdir", "-p", "/srv/source")
    system.run("cp", "-R", f"{CHECKOUT}/packaging/debian", "/srv/source/debian")
    options = ("--no-built-binaries", "--ignore-restrictions=isolation-machine")
    done = system.run(
        *("autopkgtest", *options, "/srv/source/", "--", "null"), timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"autopkgtest: {done.returncode}\n{said}"
    for name in ("programs", "stop"):
        assert re.search(rf"^{name} +PASS", said, re.MULTILINE), said


def _varlinkctl(system: Container) -> None:
    """Call qkilld with systemd's own Varlink client, which exists since version 255."""
    address = "/run/qkilld/org.qkilld1"
    assert "Interfaces: org.qkilld1" in system.run("varlinkctl", "info", address).stdout
    # varlinkctl parses the description, and prints it in its own layout.
    described = system.run("varlinkctl", "introspect", address, "org.qkilld1").stdout
    for member in ("method Terminate(", "type Receipt(", "error NoSuchProcess"):
        assert member in described, described

    _unit(system, "varlink.service", GUEST)
    system.run("systemctl", "start", "varlink.service")
    _wait_for_qemu(system, "varlink.service")
    pid = int(system.property("varlink.service", "MainPID"))

    def call(method: str, parameters: dict[str, Any], *options: str) -> list[dict[str, Any]]:
        arguments = (address, f"org.qkilld1.{method}", json.dumps(parameters))
        text = system.run("varlinkctl", "--json=short", *options, "call", *arguments).stdout
        # With --more, there is a record separator (RFC 7464) before each reply.
        return [json.loads(line) for line in text.replace("\x1e", "").splitlines()]

    (inspection,) = call("Inspect", {"pid": pid})
    assert inspection["guest"]["name"] == "varlink", inspection
    replies = call("Terminate", {"pid": pid}, "--more")
    assert replies[0]["state"]["pid"] == pid and len(replies) >= 2, replies
    assert replies[-1]["state"]["result"] == "exited", replies
    assert not replies[-1]["receipt"].get("dataAtRisk"), replies
    command = ("varlinkctl", "call", address, "org.qkilld1.Terminate", json.dumps({"pid": pid}))
    refused = system.run(*command, check=False)
    assert refused.returncode and "org.qkilld1.NoSuchProcess" in refused.stderr, refused


def _newer(deb: Path) -> Path:
    """The same package with a later version."""
    work = deb.parent / "newer"
    target = deb.parent / "newer_all.deb"
    subprocess.run(["rm", "-rf", work], check=True)
    subprocess.run(["dpkg-deb", "-R", deb, work], check=True)
    control = work / "DEBIAN/control"
    text = control.read_text()
    control.write_text(text.replace("\nVersion: ", "\nVersion: 1:", 1))
    build = ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "-b", str(work), str(target)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", work], check=True)
    return target


def _inside(path: Path) -> str:
    return f"{CHECKOUT}/{path.relative_to(TOP)}"


def _apt(system: Container, *command: str) -> str:
    options = ("-y", "-q", "--no-install-recommends", "-o", "APT::Sandbox::User=root")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    return system.run("apt-get", *options, *command, timeout=300, env=environment).stdout


def _nothing_enabled(system: Container) -> None:
    listed = system.run("dpkg", "-L", "qkilld").stdout.split()
    units = [Path(path).name for path in listed if path.startswith("/usr/lib/systemd/system/")]
    for unit in units:
        if not unit.endswith((".service", ".socket")) or "@" in unit:
            continue
        state = system.run("systemctl", "is-enabled", unit, check=False).stdout.strip()
        assert state in ("disabled", "static"), f"{unit} is {state}"
        if unit.endswith(".service"):
            assert system.property(unit, "ActiveState") == "inactive", f"{unit} was started"
    enabled = system.run(
        "systemctl", "--global", "is-enabled", "qkilld-guests.service", check=False
    )
    assert enabled.stdout.strip() == "disabled", f"for users: {enabled.stdout}"


def _unit(system: Container, name: str, text: str) -> None:
    system.write(f"/etc/systemd/system/{name}", text)
    system.run("systemctl", "daemon-reload")


def _call(system: Container, *arguments: str) -> str:
    return system.run("busctl", "call", *arguments).stdout


def _upgrade(system: Container, newer: Path) -> None:
    python = system.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    system.run("install", "-D", python, "/usr/local/bin/qemu-system-x86_64")
    _unit(system, "stubborn.service", STUBBORN)
    system.run("systemctl", "start", "stubborn.service")
    pid = system.property("stubborn.service", "MainPID")
    # Wait until the script ignores SIGTERM.
    deadline = time.monotonic() + 30
    while system.run("test", "-e", "/run/stubborn", check=False).returncode:
        assert time.monotonic() < deadline, "stubborn.service does not start"
        time.sleep(0.1)
    # The job has FORCE, and its grace is too long for a SIGKILL during the upgrade.
    options = ("TerminateWithOptions", "uta{sv}", pid, "1", "1", "grace-usec", "t", "600000000")
    job = _call(system, *MANAGER, *options).split('"')[1]
    before = system.property("qkilld.service", "MainPID")
    _apt(system, "install", _inside(newer))
    after = system.property("qkilld.service", "MainPID")
    assert after not in ("0", before), f"the daemon was process {before} and is process {after}"
    assert _call(system, *MANAGER, "GetJobByPID", "u", pid).split('"')[1] == job
    if system.property("stubborn.service", "MainPID") != pid:
        said = system.run("journalctl", "--output=cat", "--unit=stubborn.service").stdout
        raise AssertionError(f"the guest is gone:\n{said}")
    _call(system, MANAGER[0], job, JOB, "Force")
    assert '"killed"' in _call(system, MANAGER[0], job, JOB, "Wait")


def _remove(system: Container) -> None:
    for name in ("adopted", "edited"):
        _unit(system, f"{name}.service", GUEST)
        system.run("qkillctl", "adopt", f"{name}.service")
        system.run("systemctl", "start", f"{name}.service")
    edited = "/etc/systemd/system/edited.service.d/50-qkilld.conf"
    system.run("sh", "-c", f"echo '# mine' >>{edited}")
    _wait_for_qemu(system, "edited.service")
    _apt(system, "remove", "qkilld")
    found = system.run("find", "/etc/systemd/system", "-name", "50-qkilld.conf").stdout.split()
    assert found == [edited], found
    for name in ("adopted", "edited"):
        unit = f"{name}.service"
        assert system.property(unit, "ActiveState") == "active", f"the removal stopped {unit}"
        pid = system.property(unit, "MainPID")
        system.run("systemctl", "stop", unit)
        assert not system.run("ps", "-p", pid, "-o", "pid=", check=False).stdout.strip()
        # SIGTERM has ended QEMU, which exits with 0.
        end = system.run("cat", f"/run/{name}.end").stdout
        assert end == "exited 0\n", f"{unit} ended as {end}"
        assert system.property(unit, "Result") == "success", f"the stop of {unit} failed"
    system.run("rm", "-r", Path(edited).parent.as_posix())


def _wait_for_qemu(system: Container, unit: str) -> None:
    pid = system.property(unit, "MainPID")
    deadline = time.monotonic() + 30
    while "qemu" not in system.run("readlink", f"/proc/{pid}/exe", check=False).stdout:
        assert time.monotonic() < deadline, f"{unit} does not run QEMU"
        time.sleep(0.1)


def _left(system: Container) -> list[str]:
    """List files with qkill in their name, except those of apt, dpkg and the tests."""
    found = system.run("find", "/etc", "/usr", "/var", "/run", "-xdev", "-name", "*qkill*")
    apart = ("/var/lib/dpkg/", "/var/cache/apt/", "/var/log/", "/run/systemd/")
    return [path for path in found.stdout.splitlines() if not path.startswith(apart)]
