"""Connections to monitors on TCP and abstract sockets, and proof that they lead to the guest."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.errors import InvalidArgs, MonitorBusy, MonitorError, MonitorUnreachable
from qkilld.monitor.endpoints import AGENT_PORT, Endpoint, GuestEndpoints, Role, find_endpoints
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.job_monitor import JobMonitors
from qkilld.monitor.reach import connect_passable, prove, read_process_blocking
from qkilld.monitor.tcp import connect_in_netns, ends_in, read_tcp
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.guest import QEMU, Guest
from tests.lab.netns import NetworkNamespace
from tests.lab.process import end, spawn
from tests.monitor.connecting import run

Start = Callable[..., Guest]
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def guest_endpoints_of(pid: int) -> GuestEndpoints:
    return find_endpoints(*read_process_blocking(procfs.read_identity(pid)))


def monitor_of(guest: Guest) -> Endpoint:
    """Wait until QEMU listens; return the monitor whose connection can be passed."""
    until(lambda: guest_endpoints_of(guest.pid).passable, bool)
    return guest_endpoints_of(guest.pid).passable[0]


def connected(guest: Guest) -> socket.socket:
    return connect_in_netns(guest.pid, monitor_of(guest))


@contextlib.contextmanager
def opened(guest: Guest) -> Iterator[PidfdProcess]:
    process = open_process(guest.pid)
    try:
        yield process
    finally:
        process.close()


async def taken(guest: Guest, ask: Callable[[GuestControl], Awaitable[T]]) -> T:
    """Return the result of `ask` over a passed connection."""
    with opened(guest) as process:
        control = await GuestControl.take(process, connected(guest), listening_unix)
        try:
            return await ask(control)
        finally:
            control.close()


PLACES = [
    ("-qmp", "tcp:127.0.0.1:{port},server=on,wait=off", Role.QMP),
    ("-qmp", "tcp:localhost:{port},server=on,wait=off,ipv4=on,ipv6=off", Role.QMP),
    ("-qmp", "tcp::{port},server=on,wait=off", Role.QMP),
    ("-monitor", "tcp:127.0.0.1:{port},server=on,wait=off", Role.HMP),
    ("-monitor", "telnet:127.0.0.1:{port},server=on,wait=off", Role.HMP),
    ("-qmp", "unix:lab-{port},abstract=on,server=on,wait=off", Role.QMP),
    ("-qmp", "unix:lab-{port},abstract=on,tight=off,server=on,wait=off", Role.QMP),
]


@pytest.mark.parametrize(("option", "place", "role"), PLACES)
def test_a_monitor_answers_over_a_connection_that_is_passed(
    qemu: Start, option: str, place: str, role: Role
) -> None:
    guest = qemu(qmp=False, arguments=(option, place.format(port=free_port())))
    assert monitor_of(guest).role is role
    assert run(taken(guest, lambda control: control.runstate())) == "running"


@pytest.mark.parametrize(
    ("more", "is_passed"),
    [
        ((), True),
        (("agent",), True),
        (("hmp",), False),
        (("agent", "qmp"), False),
    ],
)
def test_a_monitor_is_passed_if_qkilld_reaches_no_other(
    qemu: Start, lab_dir: Path, more: tuple[str, ...], is_passed: bool
) -> None:
    """It makes no difference whether qkilld reaches the agent: an agent is not a monitor."""
    sockets = {each: f"unix:{lab_dir / each},server=on,wait=off" for each in ("qmp", "hmp")}
    arguments = {
        "qmp": ("-qmp", sockets["qmp"]),
        "hmp": ("-monitor", sockets["hmp"]),
        "agent": (
            *("-chardev", f"socket,id=agent,path={lab_dir / 'agent'},server=on,wait=off"),
            *("-device", "virtio-serial"),
            *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        ),
    }
    on_tcp = ("-M", "q35", "-S", "-qmp", PLACES[0][1].format(port=free_port()))
    guest = qemu(qmp=False, arguments=(*on_tcp, *(word for one in more for word in arguments[one])))
    monitor_of(guest)
    until(lambda: guest_endpoints_of(guest.pid).endpoints, lambda now: len(now) == len(more))
    connection = connect_passable(procfs.read_identity(guest.pid))
    assert (connection is not None) == is_passed
    if connection is not None:
        with connection:
            assert ends_in(connection, guest.pid)


def test_a_descriptor_whose_parent_had_listened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        chardev = f"socket,id=m,fd={server.fileno()},server=on,wait=off"
        process = spawn(
            [
                *(needs.program(QEMU, "qemu-system-x86"), "-M", "none", "-nodefaults"),
                *("-display", "none", "-chardev", chardev, "-mon", "m,mode=control"),
            ],
            pass_fds=(server.fileno(),),
        )
    try:
        endpoints = until(lambda: guest_endpoints_of(process.pid).passable, bool)
        assert [one.role for one in endpoints] == [Role.QMP]
    finally:
        end(process)


@pytest.mark.parametrize("place", [PLACES[0][1], PLACES[2][1], PLACES[6][1]])
def test_its_own_connection_is_never_cut_off(qemu: Start, place: str) -> None:
    ours = f"socket,id=ours,host=127.0.0.1,port={free_port()},server=on,wait=off"
    text = place.removeprefix("tcp:").removeprefix("unix:").format(port=free_port())
    first, _, rest = text.partition(",")
    host, _, port = first.rpartition(":")
    where = f"host={host},port={port}" if "tcp" in place else f"path={first}"
    guest = qemu(
        qmp=False,
        arguments=(
            *("-chardev", f"socket,id=own,{where},{rest}", "-mon", "own,mode=control"),
            *("-chardev", ours),
        ),
    )

    async def labels(control: GuestControl) -> tuple[list[str], list[object]]:
        instances = await control.query_yank()
        return [*control.own_chardevs], [one.wire.get("id") for one in instances]

    assert run(taken(guest, labels)) == (["own"], ["ours"])


def test_in_the_guests_own_network_namespace(qemu: Start) -> None:
    """In our own namespace, another program listens on the same port."""
    with NetworkNamespace() as network, socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        guest = network.run(
            lambda: qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=port)))
        )
        before = Path("/proc/thread-self/ns/net").stat()
        # Connect in another thread, because the thread enters the namespace.
        with NetworkNamespace() as thread, opened(guest) as process:
            connection = thread.run(lambda: connected(guest))
            assert run(prove(process, connection)).role is Role.QMP
            connection.close()
        assert os.path.samestat(before, Path("/proc/thread-self/ns/net").stat())
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_connection_of_the_same_addresses_in_another_namespace(qemu: Start) -> None:
    """A passed connection must be in the guest's network namespace. The same addresses are not
    enough."""
    guest = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    with connected(guest) as real, NetworkNamespace() as network:

        def imitate() -> tuple[socket.socket, socket.socket]:
            with socket.create_server(real.getpeername()) as server:
                client = socket.create_connection(
                    real.getpeername(), source_address=real.getsockname()
                )
                return client, server.accept()[0]

        false, end = network.run(imitate)
        with false, end:
            assert false.getsockname() == real.getsockname()
            assert false.getpeername() == real.getpeername()
            assert ends_in(real, guest.pid) and not ends_in(false, guest.pid)


def refusal(guest: Guest, passed: int) -> str:
    async def check() -> None:
        with opened(guest) as process:
            await JobMonitors(listening_unix).check_passed(process, passed)

    with pytest.raises(InvalidArgs) as caught:
        run(check())
    return str(caught.value)


def test_a_connection_to_another_process_is_refused(qemu: Start, lab_dir: Path) -> None:
    guest = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    other = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    with connected(other) as connection:
        assert "another process" in refusal(guest, connection.fileno())
    one, two = socket.socketpair()
    with one, two:
        assert "another process" in refusal(guest, one.fileno())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        assert "no stream socket" in refusal(guest, datagram.fileno())
    with socket.socket() as unconnected:
        assert refusal(guest, unconnected.fileno())
    with Path(lab_dir / "file").open("wb") as file:
        assert refusal(guest, file.fileno())


def test_a_connection_to_another_port_of_the_process(qemu: Start) -> None:
    port = free_port()
    serial = ("-serial", f"tcp:127.0.0.1:{port},server=on,wait=off")
    guest = qemu(qmp=False, arguments=("-M", "pc", *serial))
    until(lambda: any(each.local.port == port for each in read_tcp(guest.pid)), bool)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        until(lambda: ends_in(connection, guest.pid), bool)
        assert "a monitor" in refusal(guest, connection.fileno())


def test_a_monitor_that_somebody_uses(qemu: Start) -> None:
    guest = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    free = monitor_of(guest)
    with connected(guest):
        with pytest.raises(MonitorBusy, match="Another program"):
            connected(guest)
        with pytest.raises(MonitorBusy, match="does not accept"):
            connect_in_netns(guest.pid, free)


def test_it_does_not_listen_any_more(qemu: Start) -> None:
    guest = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    endpoint = monitor_of(guest)
    guest.close()
    with pytest.raises(MonitorError):
        connect_in_netns(guest.pid, endpoint)


def test_the_process_of_the_helper_connects_by_itself(qemu: Start) -> None:
    guest = qemu(qmp=False, arguments=("-qmp", PLACES[0][1].format(port=free_port())))
    monitor_of(guest)

    async def status(enter_netns: bool) -> str:
        with opened(guest) as process:
            control = await GuestControl.open(process, listening_unix, enter_netns=enter_netns)
            try:
                return await control.runstate()
            finally:
                control.close()

    assert run(status(True)) == "running"
    with pytest.raises(MonitorUnreachable, match="qkilld-stop or qkillctl passes"):
        run(status(False))
