"""Terminate with POWERDOWN: the real daemon and a real QEMU."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.agents import ANSWERING, SILENT
from tests.lab.bus import CallError, Client, plain
from tests.lab.debian import FILES, boot_debian
from tests.lab.guest import Guest
from tests.lab.log import wait_for_path

Make = Callable[..., Guest]
FORCE, NOWAIT, POWERDOWN = 1, 2, 4


def test_a_guest_without_an_operating_system_is_deaf_and_gets_sigterm(
    client: Client, qemu: Make
) -> None:
    """The guest's processors are idle, and nothing in the guest listens to the power button."""
    guest = qemu(arguments=["-M", "q35", "-m", "32"])
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, guest.wait_gone()) == ("exited", 0)
    assert receipt["guest-asked"] in ("deaf", "not-running", "ignored")
    assert [action for _, action, _ in receipt["rungs"]][-1] == "SIGTERM"


def test_a_guest_without_a_monitor_gets_sigterm_at_once(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "unreachable")


def test_the_plan_names_the_ways(client: Client, qemu: Make) -> None:
    def plan(guest: Guest) -> dict[str, Any]:
        return dict(plain(client.call("Plan", "uta{sv}", guest.pid, POWERDOWN, {})[0]))

    found = plan(qemu())
    assert [tuple(rung[:2]) for rung in found["rungs"]] == [
        ("powerdown", "ask"),
        ("terminate", "SIGTERM"),
    ]
    assert any(way.startswith("the monitor at ") for way in found["ways"])
    found = plan(qemu(qmp=False))
    assert [tuple(rung) for rung in found["rungs"]] == [("terminate", "SIGTERM", 0)]
    assert found["ways"]


def test_the_plan_for_a_stopped_process(client: Client, qemu: Make) -> None:
    guest = qemu()
    guest.signal(signal.SIGSTOP)

    def plan(flags: int, **options: Any) -> tuple[list[str], list[str]]:
        found = plain(client.call("Plan", "uta{sv}", guest.pid, flags, options)[0])
        return [rung[1] for rung in found["rungs"]], found["warnings"]

    cannot = (
        "it is stopped (SIGSTOP), so its guest cannot be asked to shut down; the option resume"
        " continues it first"
    )
    rungs, warnings = plan(POWERDOWN)
    assert rungs == ["SIGTERM"] and cannot in warnings
    rungs, warnings = plan(POWERDOWN, resume=("b", True))
    assert rungs == ["SIGCONT", "ask", "SIGTERM"] and cannot not in warnings
    rungs, warnings = plan(POWERDOWN | NOWAIT, resume=("b", True))
    assert rungs == ["SIGCONT", "ask"]


@pytest.mark.parametrize("kind", ["qmp", "monitor"])
def test_the_plan_says_what_a_human_monitor_cannot_do(
    client: Client, qemu: Make, lab_dir: Path, kind: str
) -> None:
    socket = f"unix:{lab_dir / 'socket'},server=on,wait=off"
    guest = qemu(qmp=False, arguments=[f"-{kind}", socket])
    wait_for_path(lab_dir / "socket", 30)
    found = plain(client.call("Plan", "uta{sv}", guest.pid, 0, {})[0])
    said = any("its only monitor is a human one" in text for text in found["warnings"])
    assert said is (kind == "monitor")


def test_a_socket_that_is_not_the_guests_is_refused(client: Client, qemu: Make) -> None:
    guest = qemu()
    with pytest.raises(CallError) as caught:
        client.terminate(guest.pid, POWERDOWN, qmp_socket=("s", "/run/somebody/elses.sock"))
    assert caught.value.name == "org.qkilld1.Error.InvalidArgs"
    assert guest.alive


@pytest.mark.timeout(900)
@pytest.mark.parametrize("agent", [True, False], ids=["agent", "button"])
def test_data_written_by_the_guest_is_kept(client: Client, agent: bool) -> None:
    with boot_debian() as debian:
        if not agent:
            debian.shell.run("systemctl stop qemu-guest-agent")
        debian.write_files()
        result, receipt = client.wait(client.terminate(debian.guest.pid, POWERDOWN | FORCE))
        assert (result, receipt["guest-asked"]) == ("exited", "shut-down")
        assert [action for _, action, _ in receipt["rungs"]] == ["agent" if agent else "button"]
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (FILES, True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("agent", "rungs"),
    [(SILENT, ["button"]), (ANSWERING, ["agent", "button"])],
    ids=["silent", "answers"],
)
def test_an_agent_that_does_nothing_is_followed_by_the_button(
    client: Client, agent: str, rungs: list[str]
) -> None:
    with boot_debian() as debian:
        debian.shell.run(agent)
        debian.write_files()
        result, receipt = client.wait(client.terminate(debian.guest.pid, POWERDOWN), timeout=300)
        assert (result, receipt["guest-asked"]) == ("exited", "shut-down")
        assert [action for _, action, _ in receipt["rungs"]] == rungs
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (FILES, True)


@pytest.mark.timeout(900)
def test_sigterm_alone_pulls_the_plug(client: Client) -> None:
    """This shows why a guest should be asked first."""
    with boot_debian() as debian:
        debian.write_files()
        result, receipt = client.wait(client.terminate(debian.guest.pid, FORCE))
        assert (result, receipt["guest-asked"]) == ("exited", "not-asked")
        kept, clean = debian.kept()
    assert (kept < FILES, clean) == (True, False)
