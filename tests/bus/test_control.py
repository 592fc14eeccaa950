"""Extend, Hold, Release and Force of a job, over a real bus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID

FORCE, FIXED = 1, 8
S = 1_000_000
JOB = "org.qkilld1.Job"
NEVER = 2**64 - 1
BUS: Any = {
    "destination": "org.freedesktop.DBus",
    "path": "/org/freedesktop/DBus",
    "interface": "org.freedesktop.DBus",
}
Make = Callable[..., Guest]


def call(client: Client, job: str, member: str, signature: str = "", *body: Any) -> None:
    assert client.call(member, signature, *body, path=job, interface=JOB) == ()


def test_held_and_released(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 3 * S), stall_usec=("t", 2 * S))
    call(client, job, "Hold")
    values = client.properties(job, JOB)
    assert (values["Held"], values["DeadlineUSec"]) == (True, NEVER)
    # Wait for the SIGKILL of a later job with the same grace. Without the hold, the first job would
    # have sent SIGKILL earlier.
    other = fake_qemu(stubborn=True)
    assert client.wait(client.terminate(other.pid, FORCE, grace_usec=("t", 3 * S)))[0] == "killed"
    assert guest.alive
    call(client, job, "Release")
    assert client.wait(job)[0] == "killed"
    assert client.properties(job, JOB)["Held"] is False
    daemon.wait_for(r"Uid \d+ holds the stop of .*: no more signals until it is released")
    daemon.wait_for(r"Uid \d+ released the stop of")


def test_extended(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 3 * S), max_usec=("t", 4 * S))
    call(client, job, "Extend", "t", 8 * S)
    result, receipt = client.wait(job)
    assert result == "killed"
    assert 8 * S <= receipt["elapsed-usec"] < 30 * S


def test_forced(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FIXED)  # FIXED takes no samples
    call(client, job, "Force")
    # Only Force can have caused the SIGKILL, because the job was started without FORCE.
    result, receipt = client.wait(job)
    assert (result, [name for _, name, _ in receipt["rungs"]]) == ("killed", ["SIGTERM", "SIGKILL"])
    assert receipt["data-at-risk"] is True
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


def test_the_owner_does_not_overrule_root(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    needs.root("to stop the guest of another user")
    guest = fake_qemu(stubborn=True, uid=OTHER_UID)
    job = client.terminate(guest.pid, FORCE, max_usec=("t", 1_500_000))
    with daemon.bus.client(uid=OTHER_UID) as owner:
        for member, arguments in (
            *(("Hold", ()), ("Release", ()), ("Force", ()), ("Cancel", ())),
            ("Extend", ("t", NEVER)),
        ):
            with pytest.raises(CallError) as caught:
                call(owner, job, member, *arguments)
            assert caught.value.name == "org.freedesktop.DBus.Error.AccessDenied"
        call(owner, job, "Extend", "t", 10_000)
        # A request of the owner that joins the job cannot delay SIGKILL forever, either.
        never = ("t", NEVER)
        assert owner.terminate(guest.pid, FORCE, grace_usec=never, max_usec=never) == job
    assert client.wait(job)[0] == "killed"


def test_root_takes_over_a_job_with_infinite_spans(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    needs.root("to stop the guest of another user")
    guest = fake_qemu(stubborn=True, uid=OTHER_UID)
    with daemon.bus.client(uid=OTHER_UID) as owner:
        job = owner.terminate(guest.pid, grace_usec=("t", NEVER))
        call(owner, job, "Hold")
        call(owner, job, "Extend", "t", NEVER)
        assert client.terminate(guest.pid, FORCE, max_usec=("t", 300_000)) == job
        assert client.wait(job)[0] == "killed"
    daemon.wait_for("Uid 0 took over the stop of")


def test_a_flood_of_commands_does_not_flood_the_journal(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, grace_usec=("t", 60 * S))
    began = time.monotonic()
    for _ in range(200):
        call(client, job, "Hold")
        call(client, job, "Release")
    took = time.monotonic() - began
    daemon.wait_for(r"\(\d+ of these in a second\.\)")
    assert daemon.stderr.text().count("holds the stop of") <= took + 3


def test_a_stranger_who_waits_is_not_missed(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    needs.root("to be another user")
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, grace_usec=("t", 60 * S))
    with daemon.bus.client(uid=OTHER_UID) as stranger:
        for _ in range(100):
            stranger.send("Wait", path=job, interface=JOB)
        stranger.properties(job, JOB)  # the reply shows that the calls have arrived
        name = stranger.unique_name
    until(lambda: client.call("NameHasOwner", "s", name, **BUS), lambda owned: owned == (False,))
    # The reply shows that the daemon has noticed the end of the stranger's connection.
    assert client.properties(job, JOB)["Result"] == ""
    assert "no longer waits" not in daemon.stderr.text()
    with daemon.bus.client() as requester:
        requester.send("Wait", path=job, interface=JOB)
        requester.properties(job, JOB)
    daemon.wait_for("no longer waits")
    assert daemon.stderr.text().count("no longer waits") == 1
