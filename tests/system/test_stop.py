"""qkilld-stop as ExecStop= of real units, on a real systemd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from qkilld.engine.events import MessageId
from tests.lab.container import CHECKOUT, PYTHON, Container
from tests.lab.process import TOP

HELPER = f"{PYTHON} -m qkilld.stop"
QEMU = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
_ENVIRONMENT = f"Environment=PYTHONPATH={CHECKOUT} PYTHONDONTWRITEBYTECODE=1"

_numbers = itertools.count(1)
StartUnit = Callable[..., str]


@pytest.fixture(scope="module")
def system(container: Container) -> Iterator[Container]:
    """With the daemon installed and up."""
    container.copy_in(TOP / "dbus/org.qkilld1.conf", "/etc/dbus-1/system.d/org.qkilld1.conf")
    container.copy_in(TOP / "units/qkilld.service", "/etc/systemd/system/qkilld.service")
    container.write(
        "/etc/systemd/system/qkilld.service.d/checkout.conf",
        f"[Service]\nExecStart=\nExecStart={PYTHON} -m qkilld\n{_ENVIRONMENT}\n",
    )
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "reload", "dbus.service")
    container.run("systemctl", "start", "qkilld.service")
    yield container
    container.run("systemctl", "stop", "qkilld.service")


@pytest.fixture
def start_unit(system: Container) -> Iterator[StartUnit]:
    """A function: starts a QEMU as a unit with the helper, with these lines more in [Service]."""
    started = []

    def start(*lines: str, command: str = "", helper: str = HELPER, notify: bool = True) -> str:
        unit = f"stopped{next(_numbers)}.service"
        command = command or f"{QEMU} -name {unit.removesuffix('.service')}"
        text = [f"ExecStart={command}", f"ExecStop={helper}", _ENVIRONMENT, *lines]
        if notify:
            text.append("NotifyAccess=exec")
        system.write(f"/run/systemd/system/{unit}", "[Service]\n" + "\n".join(text) + "\n")
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "start", unit)
        started.append(unit)
        return unit

    yield start
    for unit in started:
        system.run("systemctl", "kill", "--signal=KILL", unit, check=False)


def story(system: Container, unit: str) -> list[str]:
    """The names of the events that the journal has of the unit."""
    names = {message.value: message.name for message in MessageId}
    entries = system.journal("-u", unit)
    return [names[e["MESSAGE_ID"]] for e in entries if e.get("MESSAGE_ID") in names]


def stop(system: Container, unit: str) -> None:
    system.run("systemctl", "stop", unit)
    assert system.property(unit, "Result") == "success", "\n".join(
        e["MESSAGE"] for e in system.journal("-u", unit)
    )
    assert system.property(unit, "ActiveState") == "inactive"


def test_an_idle_guest_by_the_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit()
    stop(system, unit)
    system.wait_journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_ENDED.value}")
    assert story(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]


def test_without_the_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit()
    system.run("systemctl", "stop", "qkilld.service")
    try:
        stop(system, unit)
    finally:
        system.run("systemctl", "start", "qkilld.service")
    assert story(system, unit) == ["STOP_ALONE", "JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]
