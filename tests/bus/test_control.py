"""Extend, Hold, Release and Force of a job, over a real bus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab import needs
from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID

FORCE = 1
JOB = "org.qkilld1.Job"
NEVER = 2**64 - 1
Make = Callable[..., Guest]


def call(client: Client, job: str, member: str, signature: str = "", *body: Any) -> None:
    assert client.call(member, signature, *body, path=job, interface=JOB) == ()


def test_held_and_released(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 500_000), stall_usec=("t", 300_000))
    call(client, job, "Hold")
    values = client.properties(job, JOB)
    assert (values["Held"], values["DeadlineUSec"]) == (True, NEVER)
    # Another with the same grace, started later, has its SIGKILL: the first would have had it.
    other = fake_qemu(stubborn=True)
    assert client.wait(client.terminate(other.pid, FORCE, grace_usec=("t", 600_000)))[0] == "killed"
    assert guest.alive
    call(client, job, "Release")
    assert client.wait(job)[0] == "killed"
    assert client.properties(job, JOB)["Held"] is False
    daemon.wait_for(r"Uid \d+ holds the stop of .*: no more signals until it is released")
    daemon.wait_for(r"Uid \d+ released the stop of")


def test_extended(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 300_000), max_usec=("t", 400_000))
    call(client, job, "Extend", "t", 2_000_000)
    result, receipt = client.wait(job)
    assert result == "killed"
    assert 2.0 <= receipt["elapsed-usec"] / 1e6 < 3


def test_forced(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    began = time.monotonic()
    call(client, job, "Force")
    result, receipt = client.wait(job)
    assert time.monotonic() - began < 2
    assert (result, [name for _, name, _ in receipt["rungs"]]) == ("killed", ["SIGTERM", "SIGKILL"])
    assert receipt["data-at-risk"] is True  # it was not looked at yet
    for member, arguments in (("Hold", ()), ("Release", ()), ("Force", ()), ("Extend", ("t", 1))):
        with pytest.raises(CallError) as caught:
            call(client, job, member, *arguments)
        assert caught.value.name == "org.qkilld1.Error.Failed"
        assert caught.value.text == "Job 1 has ended already (killed)"


def test_not_by_strangers(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    needs.root("to be another user")
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    with daemon.bus.client(uid=OTHER_UID) as stranger:
        for member, arguments in (
            *(("Hold", ()), ("Release", ()), ("Force", ()), ("Extend", ("t", 10**9))),
        ):
            with pytest.raises(CallError) as caught:
                call(stranger, job, member, *arguments)
            assert caught.value.name == "org.freedesktop.DBus.Error.AccessDenied"
    assert client.properties(job, JOB)["Held"] is False
    assert guest.alive
