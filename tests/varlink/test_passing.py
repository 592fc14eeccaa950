"""A call can pass the daemon a connection to a monitor that can be reached only from its guest's
network namespace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bus.test_stop_asking import stop
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import Daemon
from tests.lab.guest import Guest, make_disk
from tests.lab.netns import NetworkNamespace
from tests.lab.process import OTHER_UID, TOP, end, run, spawn
from tests.lab.varlink import VarlinkClient, VarlinkError
from tests.monitor.test_tcp import connected, free_port, monitor_of
from tests.varlink.conftest import VarlinkService

Start = Callable[..., Guest]


def on_tcp() -> tuple[str, str]:
    return "-qmp", f"tcp:127.0.0.1:{free_port()},server=on,wait=off"


def terminate(client: VarlinkClient, guest: Guest, passed: int, **given: Any) -> dict[str, Any]:
    """Call Terminate with this descriptor; return the last reply."""
    client.send(
        "Terminate", more=True, descriptors=[passed], pid=guest.pid, monitorIndex=0, **given
    )
    continues = True
    while continues:
        reply, continues = client.reply()
    return reply


def descriptors_of(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def test_a_guest_is_asked_over_a_connection_that_is_passed(
    service: VarlinkService, linux_guest: Start
) -> None:
    guest = linux_guest(job="power", append="lab.power=off", arguments=on_tcp())
    before = descriptors_of(service.daemon)
    with service.client() as client:
        with connected(guest) as connection:
            last = terminate(client, guest, connection.fileno(), flags=["powerdown"])
        assert last["state"]["result"] == "exited"
        assert last["receipt"]["guestAsked"] == "shut-down"
    until(lambda: descriptors_of(service.daemon), lambda now: now <= before)


def test_its_disks_are_flushed_before_sigterm(
    service: VarlinkService, qemu: Start, lab_dir: Path
) -> None:
    disk = make_disk(lab_dir / "disk", "1M")
    guest = qemu(qmp=False, arguments=(*on_tcp(), "-drive", f"file={disk},if=none"))
    with service.client() as client, connected(guest) as connection:
        receipt = terminate(client, guest, connection.fileno())["receipt"]
    assert receipt["rungs"][0]["action"] == "flush", receipt


def test_a_connection_to_anything_but_the_monitor_is_refused(
    service: VarlinkService, qemu: Start
) -> None:
    guest, other = qemu(qmp=False, arguments=on_tcp()), qemu(qmp=False, arguments=on_tcp())
    one, two = socket.socketpair()
    before = descriptors_of(service.daemon)
    with connected(other) as elsewhere, one, two, Path("/dev/null").open("rb") as file:
        for passed in (elsewhere.fileno(), one.fileno(), file.fileno()):
            with service.client() as client, pytest.raises(VarlinkError) as caught:
                terminate(client, guest, passed)
            assert caught.value.name == "org.qkilld1.InvalidArgs"
    with service.client() as client:
        for given in ({"monitorIndex": 0}, {"monitorIndex": -1}):
            with pytest.raises(VarlinkError) as caught:
                client.call("Terminate", pid=guest.pid, **given)
            assert caught.value.name == "org.qkilld1.InvalidArgs"
    assert guest.alive
    until(lambda: descriptors_of(service.daemon), lambda now: now <= before)


def test_a_caller_who_may_not_stop_the_guest_is_denied(
    service: VarlinkService, qemu: Start
) -> None:
    guest = qemu(qmp=False, arguments=on_tcp())
    with (
        connected(guest) as connection,
        service.client(OTHER_UID) as client,
        pytest.raises(VarlinkError) as caught,
    ):
        terminate(client, guest, connection.fileno())
    assert caught.value.name == "org.varlink.service.PermissionDenied"
    assert guest.alive


def test_a_job_that_runs_goes_on_without_it(service: VarlinkService, qemu: Start) -> None:
    guest = qemu(qmp=False, arguments=on_tcp())
    with connected(guest) as connection, service.client() as client, service.client() as other:
        guest.signal(signal.SIGSTOP)
        job = client.call("Terminate", pid=guest.pid)["state"]["job"]
        before = descriptors_of(service.daemon)
        other.send("Terminate", descriptors=[connection.fileno()], pid=guest.pid, monitorIndex=0)
        assert other.reply()[0]["state"]["job"] == job
        until(lambda: descriptors_of(service.daemon), lambda now: now <= before)
        guest.signal(signal.SIGCONT)
        assert client.call("Wait", job=job)["state"]["result"] == "exited"


def test_the_connection_outlives_the_daemon_s_call(
    service: VarlinkService, linux_guest: Start
) -> None:
    """The client that passed the connection has left, and the daemon still observes the guest."""
    guest = linux_guest(job="power", append="lab.power=work lab.seconds=2", arguments=on_tcp())
    with service.client() as client, connected(guest) as connection:
        client.send(
            "Terminate",
            descriptors=[connection.fileno()],
            pid=guest.pid,
            flags=["powerdown"],
            monitorIndex=0,
        )
        job = client.reply()[0]["state"]["job"]
    with service.client() as client:
        last = client.call("Wait", job=job)
    assert last["receipt"]["guestAsked"] == "shut-down"


def outcome(service: VarlinkService) -> str:
    """Return the result of asking the guest in job 1, which has ended."""
    with service.client() as client:
        return str(client.call("Wait", job=1)["receipt"]["guestAsked"])


def helper(
    service: VarlinkService, guest: Guest, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return run(
        [
            *(sys.executable, "-m", "qkilld.stop", f"--socket={service.path}"),
            *(f"--pid={guest.pid}", *arguments),
        ],
        env=os.environ
        | {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus", "PYTHONPATH": str(TOP)},
    )


PLACES = {
    "tcp": ("-qmp", "tcp:127.0.0.1:{port},server=on,wait=off"),
    "telnet": ("-monitor", "telnet:127.0.0.1:{port},server=on,wait=off"),
    "abstract": ("-qmp", "unix:lab-{port},abstract=on,server=on,wait=off"),
}


@pytest.mark.parametrize(
    ("place", "own"), [("tcp", True), ("telnet", False), ("abstract", True), ("abstract", False)]
)
def test_qkilld_stop_passes_a_connection(
    service: VarlinkService, linux_guest: Start, place: str, own: bool
) -> None:
    """qkilld-stop runs in the host's network namespace. As root, it can also enter a namespace of
    the guest."""
    option, text = PLACES[place]
    arguments = (option, text.format(port=free_port()))

    def start() -> Guest:
        return linux_guest(job="power", append="lab.power=off", arguments=arguments)

    with NetworkNamespace() as network:
        guest = network.run(start) if own else start()
        monitor_of(guest)
        done = helper(service, guest)
        assert done.returncode == 0, done.stderr
        assert guest.wait_gone() == 0
    # A human monitor does not report that the guest has powered off.
    assert outcome(service) == ("asked" if place == "telnet" else "shut-down")


def ctl(service: VarlinkService, *arguments: str) -> Any:
    """Return what qkillctl prints with --json."""
    bus = service.daemon.bus.address
    words = ["-m", "qkilld.ctl", "--bus", bus, "--json", *arguments, f"--socket={service.path}"]
    done = run([sys.executable, *words], env=os.environ | {"PYTHONPATH": str(TOP)})
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_qkillctl_passes_a_connection(service: VarlinkService, linux_guest: Start) -> None:
    """As root, qkillctl can enter the guest's own network namespace."""
    with NetworkNamespace() as network:
        guest = network.run(
            lambda: linux_guest(job="power", append="lab.power=off", arguments=on_tcp())
        )
        monitor_of(guest)
        (document,) = ctl(service, "terminate", "--wait", "--powerdown", str(guest.pid))
    assert document["result"] == "exited" and document["receipt"]["guest_asked"] == "shut-down"


def test_qkillctl_stops_all_with_one_call(service: VarlinkService, fake_qemu: Start) -> None:
    """Root follows the job on Varlink, with the same output as over D-Bus."""
    guests = [fake_qemu(name=f"g{number}") for number in range(3)]
    stubborn = fake_qemu(name="stubborn", stubborn=True)
    documents = ctl(service, "terminate", "--all", "--force", "--wait", "--grace=1s", "--stall=1s")
    results = {one["pid"]: one for one in documents}
    assert {pid: one["result"] for pid, one in results.items()} == {
        **{guest.pid: "exited" for guest in guests},
        stubborn.pid: "killed",
    }
    assert all(one["job"] for one in documents)
    with service.daemon.bus.client() as client:
        _, receipt = client.wait(results[stubborn.pid]["job"])
    own = results[stubborn.pid]["receipt"]
    assert {key for key in own if own[key] is not None} == {
        key.replace("-", "_") for key in receipt
    }
    assert own["elapsed_usec"] == receipt["elapsed-usec"]
    assert [rung["action"] for rung in own["rungs"]] == ["SIGTERM", "SIGKILL"]


def test_qkillctl_stops_all_without_varlink(service: VarlinkService, fake_qemu: Start) -> None:
    guest = fake_qemu()
    away = service.path.with_name("nowhere")
    documents = ctl(VarlinkService(service.daemon, away), "terminate", "--all", "--wait")
    assert [(one["pid"], one["result"]) for one in documents] == [(guest.pid, "exited")]


def test_qkilld_stop_uses_it_itself_without_a_daemon(
    service: VarlinkService, linux_guest: Start, lab_dir: Path
) -> None:
    guest = linux_guest(job="power", append="lab.power=off", arguments=on_tcp())
    monitor_of(guest)
    assert stop(service.daemon.root, lab_dir, f"--pid={guest.pid}") == 0
    assert guest.wait_gone() == 0
    assert guest.serial is not None and "Power down" in guest.serial.text()


def test_a_helper_of_the_guests_user_passes_it(service: VarlinkService, linux_guest: Start) -> None:
    needs.readable_by_others(TOP)
    guest = linux_guest(job="power", append="lab.power=off", arguments=on_tcp(), uid=OTHER_UID)
    monitor_of(guest)
    may_read = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    process = spawn(
        [
            *("setpriv", f"--reuid={OTHER_UID}", f"--regid={OTHER_UID}", "--clear-groups"),
            *(*may_read, "--", sys.executable, "-m", "qkilld.stop"),
            *(f"--socket={service.path}", f"--pid={guest.pid}"),
        ],
        env=os.environ | {"PYTHONPATH": str(TOP)},
    )
    try:
        assert process.wait(60) == 0
    finally:
        end(process)
    assert outcome(service) == "shut-down"
