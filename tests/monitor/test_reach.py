"""Finding the monitor of a real QEMU, and connecting to nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.errors import MonitorBusy, MonitorTimeout, MonitorUnreachable
from qkilld.monitor import reach
from qkilld.monitor.agent import AgentClient
from qkilld.monitor.endpoints import Endpoint, GuestEndpoints, Role, UnixListener
from qkilld.monitor.hmp import HmpClient
from qkilld.monitor.qmp import QmpClient
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.guest import QEMU, Guest
from tests.lab.log import wait_for_path
from tests.lab.process import OTHER_UID, end, spawn
from tests.lab.process import run as run_program
from tests.monitor.connecting import connected, guest_endpoints_of, run

Start = Callable[..., Guest]


async def status_of(pid: int) -> str:
    """Query over a new connection."""
    client = await QmpClient.open(await connected(pid), timeout_s=30)
    try:
        answer = await client.execute("query-status", timeout_s=30)
        return str(answer["status"])
    finally:
        client.close()


def paths_of(endpoint: Endpoint) -> tuple[str, ...]:
    assert isinstance(endpoint.listener, UnixListener)
    return endpoint.listener.paths


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    """A socket of another program, for example one that activates a service."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.setblocking(False)
        yield server


def nobody_came(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("options", [{}, {"daemonize": True}, {"uid": OTHER_UID}])
def test_a_monitor_is_found_and_answers(qemu: Start, options: dict[str, object]) -> None:
    assert run(status_of(qemu(**options).pid)) == "running"


def test_a_descriptor_whose_parent_had_listened(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_tcp_listeners(*_: object) -> None:
        raise AssertionError("the table of all TCP connections is read")

    monkeypatch.setattr(reach, "read_tcp_listeners", read_tcp_listeners)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(lab_dir / "qmp"))
        server.listen()
        arguments = ["-M", "none", "-nodefaults", "-display", "none"]
        arguments += ["-chardev", f"socket,id=m,fd={server.fileno()},server=on,wait=off"]
        process = spawn(
            [needs.program(QEMU, "qemu-system-x86"), *arguments, "-mon", "m,mode=control"],
            pass_fds=(server.fileno(),),
        )
    try:
        # Until QEMU itself calls listen(2), SO_PEERCRED shows the process that listened first, and
        # the connection of a failed attempt waits to be accepted. QEMU may then not answer the next
        # attempt.
        until = time.monotonic() + 120
        while True:
            try:
                assert run(status_of(process.pid)) == "running"
                break
            except (MonitorUnreachable, MonitorBusy, MonitorTimeout):
                assert time.monotonic() < until
                time.sleep(0.05)
    finally:
        end(process)


def test_a_human_monitor_alone(qemu: Start, lab_dir: Path) -> None:
    monitor = ("-monitor", f"unix:{lab_dir}/hmp,server=on,wait=off")
    guest = qemu(qmp=False, arguments=monitor)
    wait_for_path(lab_dir / "hmp", 30)

    async def ask() -> str:
        client = await HmpClient.open(await connected(guest.pid, Role.HMP), timeout_s=30)
        try:
            return await client.hmp("info status", timeout_s=30)
        finally:
            client.close()

    assert run(ask()) == "VM status: running\n"


def test_the_agents_socket(qemu: Start, lab_dir: Path) -> None:
    agent = ["-M", "pc", "-S", "-device", "virtio-serial"]
    agent += ["-chardev", f"socket,id=g,path={lab_dir}/agent,server=on,wait=off"]
    agent += ["-device", "virtserialport,chardev=g,id=port,name=org.qemu.guest_agent.0"]
    guest = qemu(arguments=agent)

    async def ask() -> GuestEndpoints:
        guest_endpoints = await guest_endpoints_of(guest.pid)
        connection = await connected(guest.pid, Role.AGENT, guest_endpoints=guest_endpoints)
        with pytest.raises(MonitorTimeout):
            await AgentClient.open(connection, timeout_s=0.1)
        return guest_endpoints

    guest_endpoints = run(ask())
    assert (guest_endpoints.agent_chardev, guest_endpoints.agent_device) == ("g", "port")


def test_monitors_of_a_config_file_are_found(qemu: Start, lab_dir: Path) -> None:
    text = '[chardev "m"]\n backend = "socket"\n server = "on"\n wait = "off"\n'
    text += f' path = "{lab_dir}/other"\n[mon]\n chardev = "m"\n mode = "control"\n'
    (lab_dir / "config").write_text(text)
    guest = qemu(arguments=("-readconfig", str(lab_dir / "config")))
    assert guest.qmp is not None
    guest_endpoints = run(guest_endpoints_of(guest.pid))
    assert {path for endpoint in guest_endpoints.endpoints for path in paths_of(endpoint)} == {
        str(guest.qmp),
        f"{lab_dir}/other",
    }


def test_a_link_to_another_guests_monitor(qemu: Start) -> None:
    guest, other = qemu(), qemu()
    assert guest.qmp is not None and other.qmp is not None
    guest.qmp.unlink()
    guest.qmp.symlink_to(other.qmp)
    with pytest.raises(MonitorUnreachable, match="Another file"):
        run(connected(guest.pid))
    # Without the kernel's table, the owner of the file is the right user, but the peer is another
    # process.
    with pytest.raises(MonitorUnreachable, match="Another process"):
        run(connected(guest.pid, table=lambda: None))


def test_a_socket_that_starts_a_service(qemu: Start, lab_dir: Path) -> None:
    guest = qemu()
    assert guest.qmp is not None
    with listener(lab_dir / "service") as server:
        guest.qmp.unlink()
        guest.qmp.symlink_to(lab_dir / "service")
        with pytest.raises(MonitorUnreachable):
            run(connected(guest.pid))
        assert nobody_came(server)
    guest.qmp.unlink()
    with listener(guest.qmp) as server:
        with pytest.raises(MonitorUnreachable):
            run(connected(guest.pid))
        assert nobody_came(server)


def test_a_service_that_the_command_line_names(qemu: Start, lab_dir: Path) -> None:
    with listener(lab_dir / "service") as server:
        guest = qemu(arguments=("-qmp", f"unix:{lab_dir}/service"))
        server.setblocking(True)
        own = server.accept()[0]  # QEMU is the client of this connection.
        server.setblocking(False)
        guest_endpoints = run(guest_endpoints_of(guest.pid))
        assert [paths_of(one) for one in guest_endpoints.endpoints] == [(str(guest.qmp),)]
        assert nobody_came(server)
        own.close()


def test_another_users_guest_does_not_get_us_to_roots_sockets(qemu: Start, lab_dir: Path) -> None:
    """The kernel does not show the sockets in the guest's network namespace."""
    guest = qemu(uid=OTHER_UID)
    assert guest.qmp is not None
    with listener(lab_dir / "service") as server:
        guest.qmp.unlink()
        guest.qmp.symlink_to(lab_dir / "service")
        for table in (lambda: None, dict[tuple[int, int], int]):
            with pytest.raises(MonitorUnreachable, match="Another file"):
                run(connected(guest.pid, table=table))
        assert nobody_came(server)


@pytest.mark.parametrize("known", [True, False])
def test_a_monitor_in_use_is_left_alone(qemu: Start, known: bool) -> None:
    guest = qemu()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.qmp))
        client.recv(1000)
        guest_endpoints = run(guest_endpoints_of(guest.pid))
        assert guest_endpoints.endpoints[0].listener.in_use
        if not known:
            (endpoint,) = guest_endpoints.endpoints
            unused = dataclasses.replace(endpoint.listener, in_use=False)
            guest_endpoints = GuestEndpoints(
                endpoints=(dataclasses.replace(endpoint, listener=unused),)
            )

        async def try_it() -> None:
            await QmpClient.open(await connected(guest.pid, guest_endpoints=guest_endpoints))

        began = time.monotonic()
        with pytest.raises(MonitorBusy):
            run(try_it())
        assert time.monotonic() - began < 10  # 1 s; more if the host is busy.


def test_rows_in_the_name_of_another_users_socket(qemu: Start, lab_dir: Path) -> None:
    """The kernel shows line feeds in the name of a socket as they are."""
    guest = qemu()

    def unused() -> Endpoint:
        # QEMU may not know yet that the lab has closed its connection.
        return until(
            lambda: run(guest_endpoints_of(guest.pid)).endpoints[0],
            lambda endpoint: not endpoint.listener.in_use,
        )

    inode = unused().listener.inode
    with listener(lab_dir / "other") as other, contextlib.ExitStack() as stack:
        for row in (
            f"0: 00000003 00000000 00000000 0001 03 {inode} {guest.qmp}",
            f"0: 00000003 00000000 00000000 0001 03 {inode}",
            f"0: 00000002 00000000 00010000 0001 01 {inode} {lab_dir}/other",
            "0: 00000002 00000000 00010000 0001",
            "\n\r",
        ):
            forging = stack.enter_context(socket.socket(socket.AF_UNIX))
            forging.bind(f"\0\n{row}")
            forging.listen()
        endpoint = unused()
        assert run(status_of(guest.pid)) == "running"
        # The guest's command line does not name the other socket.
        assert str(guest.qmp) in paths_of(endpoint) and nobody_came(other)


def test_a_silent_monitor_is_known_in_a_second() -> None:
    async def try_it() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            await QmpClient.open(ours)

    began = time.monotonic()
    with pytest.raises(MonitorBusy):
        run(try_it())
    assert 0.9 < time.monotonic() - began < 10


@pytest.mark.parametrize("file_system", ["tmpfs", "overlay"])
def test_a_mount_namespace_of_its_own(lab_dir: Path, file_system: str) -> None:
    """As with PrivateTmp=, the path leads this process to another socket."""
    needs.root("to mount")
    place = lab_dir / "place"
    place.mkdir()
    mount = f"mount -t tmpfs none {place}"
    if file_system == "overlay":
        mount += f" && cd {place} && mkdir u w l m && mount -t overlay none m"
        mount += " -o lowerdir=l,upperdir=u,workdir=w"
        place = place / "m"
    qemu = needs.program(QEMU, "qemu-system-x86")
    command = f"{mount} && exec {qemu} -M none -nodefaults -display none"
    command += f" -qmp unix:{place}/qmp,server=on,wait=off"
    process = spawn(["unshare", "--mount", "sh", "-c", command])
    try:
        until = time.monotonic() + 30
        while not Path(f"/proc/{process.pid}/root{place}/qmp").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        place.mkdir(exist_ok=True, parents=True)
        with listener(place / "qmp") as server:
            table = listening_unix()
            assert table is not None
            assert run(status_of(process.pid)) == "running"
            assert nobody_came(server)
    finally:
        end(process)


def test_the_table_has_what_this_process_listens_on(lab_dir: Path) -> None:
    with listener(lab_dir / "s") as server:
        table = listening_unix()
        status = (lab_dir / "s").stat()
        assert table is not None
        assert table[status.st_dev, status.st_ino & 0xFFFFFFFF] == os.fstat(server.fileno()).st_ino


_OPEN = """
import asyncio, sys
from tests.monitor.test_reach import status_of
print(asyncio.run(status_of(int(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("+kill,+sys_ptrace,+dac_override", "running"),
        ("+kill,+sys_ptrace,+dac_read_search", "Permission denied"),
    ],
)
def test_the_rights_that_the_daemon_has(qemu: Start, capabilities: str, expected: str) -> None:
    """The guest's socket is in a directory that only its user may enter."""
    guest = qemu(uid=OTHER_UID)
    guest.directory.chmod(0o700)
    setpriv = needs.program("setpriv", "util-linux")
    rights = (f"--bounding-set=-all,{capabilities}", "--inh-caps=-all")
    done = run_program([setpriv, *rights, "--", sys.executable, "-c", _OPEN, str(guest.pid)])
    assert expected in done.stdout + done.stderr
