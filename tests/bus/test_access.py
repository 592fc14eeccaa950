"""Who may stop what on a bus that is not the system's, where polkit has no say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import Guest, fake_glob
from tests.lab.process import OTHER_UID

Make = Callable[..., Guest]
StartDaemon = Callable[..., Daemon]


@pytest.fixture
def own_daemon(start_daemon: StartDaemon) -> Daemon:
    """To whom nothing is a QEMU but the stand-ins of this run: all guests are to be stopped."""
    return start_daemon(config=f"[Target]\nExecutables={fake_glob()}\n[Policy]\nStallSec=0\n")


def refusal(client: Client, member: str, signature: str, *body: Any) -> tuple[str, str]:
    with pytest.raises(CallError) as caught:
        client.call(member, signature, *body)
    return caught.value.name.rpartition(".")[2], caught.value.text


def test_an_impostor_is_not_asked(own_daemon: Daemon, fake_qemu: Make) -> None:
    """On a private bus anyone can have polkit's name."""
    guest = fake_qemu()
    with own_daemon.bus.client() as impostor, own_daemon.bus.client(OTHER_UID) as stranger:
        impostor.call(
            "RequestName",
            "su",
            "org.freedesktop.PolicyKit1",
            4,
            interface="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            destination="org.freedesktop.DBus",
        )
        began = time.monotonic()
        name, text = refusal(stranger, "Terminate", "ut", guest.pid, 1)
        assert name == "AccessDenied"
        assert text == f"Process {guest.pid} is not yours, and you are not authorized to do that"
        assert time.monotonic() - began < 4, "it waited for an answer of the impostor"
    assert guest.alive


def test_all_of_ones_own(own_daemon: Daemon, fake_qemu: Make) -> None:
    roots, own, second = fake_qemu(), fake_qemu(uid=OTHER_UID), fake_qemu(uid=OTHER_UID)
    with own_daemon.bus.client(OTHER_UID) as client:
        options = {"reason": ("s", "tidying up")}
        (jobs,) = client.call("TerminateAll", "ta{sv}", 0, options)
        assert sorted(pid for pid, _ in jobs) == sorted((own.pid, second.pid))
        for _, job in jobs:
            result, receipt = client.wait(job)
            assert (result, receipt["reason"]) == ("exited", "tidying up")
        assert roots.alive
        assert refusal(client, "TerminateAll", "ta{sv}", 0, {})[0] == "AccessDenied"
    with own_daemon.bus.client() as client:
        for wrong, part in (
            ({"start-time": ("t", 1)}, "start-time"),
            ({"nonsense": ("t", 1)}, "nonsense"),
            ({"reason": ("t", 1)}, "type"),
        ):
            name, text = refusal(client, "TerminateAll", "ta{sv}", 0, wrong)
            assert (name, part in text) == ("InvalidArgs", True)
        assert roots.alive
        ((only,),) = client.call("TerminateAll", "ta{sv}", 0, {})
        assert only[0] == roots.pid
        assert client.wait(only[1])[0] == "exited"
        assert client.call("TerminateAll", "ta{sv}", 0, {}) == ([],)


def test_units_without_systemd(own_daemon: Daemon) -> None:
    with own_daemon.bus.client() as client:
        assert refusal(client, "TerminateUnit", "st", "no such.service", 0)[0] == "InvalidArgs"
        name, text = refusal(client, "TerminateUnit", "st", "nosuch.service", 0)
        assert name == "NoSuchUnit"
        assert "systemd1" not in text
        assert refusal(client, "TerminateUnit", "st", "nosuch.service", 64)[0] == "InvalidArgs"
