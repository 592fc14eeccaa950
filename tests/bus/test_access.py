"""Which guests a caller may stop on a bus other than the system bus. There, polkit is not asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from qkilld.bus.client import ManagerProxy
from qkilld.bus.connection import connect
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import UNKNOWN, Flag
from qkilld.model.job_status import JobStatus
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import Guest, own_qemus
from tests.lab.process import OTHER_UID

DBUS: Any = {
    "destination": "org.freedesktop.DBus",
    "path": "/org/freedesktop/DBus",
    "interface": "org.freedesktop.DBus",
}
JOB = "org.qkilld1.Job"
PROPERTIES = "org.freedesktop.DBus.Properties"
STRANGER = 1
"""A third user, who exists in every /etc/passwd."""
Make = Callable[..., Guest]
StartDaemon = Callable[..., Daemon]


@pytest.fixture
def own_daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon that covers only the fake guests of this test run, because the tests that use
    this daemon stop all guests."""
    return start_daemon(config=f"[Target]\nExecutables={own_qemus()}\n[Policy]\nStallSec=0\n")


def refusal(client: Client, member: str, signature: str, *body: Any) -> tuple[str, str]:
    with pytest.raises(CallError) as caught:
        client.call(member, signature, *body)
    return caught.value.name.rpartition(".")[2], caught.value.text


def test_an_impostor_is_not_asked(own_daemon: Daemon, fake_qemu: Make) -> None:
    """On a private bus, anyone can own polkit's name."""
    guest = fake_qemu()
    with own_daemon.bus.client() as impostor, own_daemon.bus.client(OTHER_UID) as stranger:
        impostor.call("RequestName", "su", "org.freedesktop.PolicyKit1", 4, **DBUS)
        name, text = refusal(stranger, "Terminate", "ut", guest.pid, 1)
        assert name == "AccessDenied"
        assert text == f"Process {guest.pid} is not yours, and you are not authorized to do that"
        # The bus delivers messages in order, so a call to the impostor would have arrived before
        # this answer.
        impostor.call("GetId", **DBUS)
        assert impostor.calls == []
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


def test_a_job_has_one_path(client: Client, fake_qemu: Make) -> None:
    job = client.terminate(fake_qemu(stubborn=True).pid)
    assert job == "/org/qkilld1/job/1"
    for alias in ("01", "0001", "000000001", "0"):
        with pytest.raises(CallError) as caught:
            client.call("Hold", path=f"/org/qkilld1/job/{alias}", interface=JOB)
        assert caught.value.name.endswith((".NoSuchJob", ".UnknownObject"))
    assert client.properties(job, JOB)["Held"] is False


def test_how_much_a_guest_writes_is_not_for_everybody(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    needs.root("to be three users")
    guest = fake_qemu(stubborn=True, uid=OTHER_UID)
    private = ("BytesWritten", "BytesPending", "Rate")
    with daemon.bus.client(uid=OTHER_UID) as owner, daemon.bus.client(uid=STRANGER) as stranger:
        stranger.subscribe()
        job = owner.terminate(guest.pid, 1, grace_usec=("t", 2_000_000))
        until(lambda: client.properties(job, JOB)["BytesWritten"], lambda number: number == 0)
        assert owner.properties(job, JOB)["BytesWritten"] == 0
        assert [stranger.properties(job, JOB)[name] for name in private] == [UNKNOWN] * 3
        assert stranger.properties(job, JOB)["Reasons"] == []
        assert owner.properties(job, JOB)["Reasons"] != []
        assert stranger.call("Get", "ss", JOB, private[0], path=job, interface=PROPERTIES) == (
            ("t", UNKNOWN),
        )
        while True:
            _, (_, changed, invalidated) = stranger.signal("PropertiesChanged", path=job)
            assert not changed.keys() & {*private, "Reasons", "Receipt"}
            if "BytesWritten" in invalidated:
                break
        receipts = [one.wait(job)[1] for one in (client, owner, stranger)]
        kept = [one.properties(job, JOB)["Receipt"] for one in (client, owner, stranger)]
        assert kept == receipts
    assert ["bytes-written" in receipt for receipt in receipts] == [True, True, False]
    assert [any(turn[2] for turn in receipt["verdicts"]) for receipt in receipts] == [
        *(True, True, False)
    ]


def test_a_client_that_follows_a_job_sees_its_end(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)

    async def follow() -> None:
        connection = await connect(BusAddress(address=daemon.bus.address))
        try:
            manager = ManagerProxy(connection)
            job = manager.job(await manager.terminate(guest.pid, Flag(0)))
            known = asyncio.Event()

            def changed(status: JobStatus) -> None:
                if status.bytes_written is not None:
                    known.set()

            async with job.watch(changed), asyncio.timeout(30):
                await known.wait()
        finally:
            connection.close()

    asyncio.run(follow())
