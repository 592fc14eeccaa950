"""The system bus is dbus-broker, as on Fedora and Arch."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import container as lab_container
from tests.lab.container import Container
from tests.lab.process import OTHER_UID

MANAGER = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
QEMU = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none -name"


@pytest.fixture(scope="module")
def system() -> Iterator[Container]:
    with lab_container.boot(message_bus="dbus-broker") as booted:
        lab_container.install(booted)
        yield booted


def start(system: Container, name: str, *options: str) -> int:
    """Start a QEMU in a unit of this name; return its process id."""
    system.run("systemd-run", f"--unit={name}", "-p", "Type=exec", *options, *QEMU.split(), name)
    return int(system.property(f"{name}.service", "MainPID"))


def test_it_is_the_bus(system: Container) -> None:
    pid = system.property("dbus.service", "MainPID")
    assert system.run("readlink", f"/proc/{pid}/exe").stdout.strip().endswith("dbus-broker-launch")


def test_the_daemon_is_started_by_a_call_and_stops_a_guest(system: Container) -> None:
    pid = start(system, "called")
    assert system.property("qkilld.service", "ActiveState") == "inactive"
    done = system.run("busctl", "call", *MANAGER, "Terminate", "ut", str(pid), "0")
    job = done.stdout.split('"')[1]
    waiting = ("busctl", "--json=short", "--timeout=60", "call", "org.qkilld1", job)
    ended = system.run(*waiting, "org.qkilld1.Job", "Wait").stdout
    assert json.loads(ended)["data"][0] == "exited"
    assert system.property("qkilld.service", "ActiveState") == "active"


def test_guests_are_told_of_and_followed(system: Container) -> None:
    start(system, "followed")
    listed = system.run("qkillctl", "list").stdout
    assert "followed.service" in listed
    # qkillctl adds match rules for signals about its job, and waits for these signals.
    done = system.run("qkillctl", "terminate", "--wait", "followed.service")
    assert "without SIGKILL" in done.stdout


def test_standard_errors_and_the_rights_of_others(system: Container) -> None:
    pid = start(system, "guarded")
    set_property = ("busctl", "set-property", *MANAGER, "NJobs", "u", "7")
    assert "NJobs cannot be set" in system.run(*set_property, check=False).stderr
    unknown = ("busctl", "call", *MANAGER[:2], "org.example.None", "Method")
    assert "No interface org.example.None there" in system.run(*unknown, check=False).stderr
    call = ("busctl", "call", *MANAGER, "Terminate", "ut", str(pid), "0")
    refused = system.run(*call, check=False, uid=OTHER_UID)
    assert refused.returncode != 0
    assert system.property("guarded.service", "ActiveState") == "active"
    # A user may not take the name.
    take = ("busctl", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus")
    own = (*take, "org.freedesktop.DBus", "RequestName", "su", "org.qkilld1", "0")
    assert "denied" in system.run(*own, check=False, uid=OTHER_UID).stderr.lower()


def test_a_unit_is_stopped_through_the_helper(system: Container) -> None:
    helper = ("-p", "ExecStop=/usr/bin/qkilld-stop", "-p", "NotifyAccess=exec")
    start(system, "helped", *helper, "-p", "RemainAfterExit=yes")
    system.run("systemctl", "stop", "helped.service")
    assert system.property("helped.service", "Result") in ("success", "")
    (receipt,) = system.journal("OBJECT_SYSTEMD_UNIT=helped.service", "QKILLD_RESULT=exited")
    assert receipt["PRIORITY"] == "6"
