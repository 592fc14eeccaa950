"""The life of the daemon: its bus name, its bus, its configuration and its exit."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qkilld import __version__
from tests.lab.bus import Bus, CallError, Client, Daemon, environment, lab_config, write_config
from tests.lab.bus import private_bus as private_bus_of
from tests.lab.guest import Guest
from tests.lab.process import TOP, run

Make = Callable[..., Guest]
Start = Callable[..., Daemon]
PYTHON = [str(TOP / ".venv/bin/python")]


@pytest.mark.each_library
def test_introspection_is_the_xml(client: Client, fake_qemu: Make) -> None:
    """The daemon's introspection data equals the XML under dbus/, member by member."""
    guest = fake_qemu()
    job = client.terminate(guest.pid)
    for path, name in (("/org/qkilld1", "org.qkilld1.Manager"), (job, "org.qkilld1.Job")):
        (text,) = client.call(
            "Introspect", path=path, interface="org.freedesktop.DBus.Introspectable"
        )
        assert interface_of(ET.fromstring(text), name) == interface_of(
            ET.parse(TOP / "dbus" / f"{name}.xml").getroot(), name
        )


def interface_of(node: ET.Element, name: str) -> list[tuple[str, ...]]:
    """Return all elements of an interface with their attributes, sorted, without comments."""
    interface = node.find(f"interface[@name='{name}']")
    assert interface is not None
    return sorted(
        (member.tag, member.attrib["name"], *(str(sorted(e.attrib.items())) for e in member.iter()))
        for member in interface
    )


@pytest.mark.each_library
def test_every_member_answers(client: Client, fake_qemu: Make) -> None:
    """Every method and property in the XML works, and has the types in the XML."""
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    bodies: dict[str, list[Any]] = {
        "u": [1],
        "t": [1],
        "ut": [1, 0],
        "uta{sv}": [1, 0, {}],
        "": [],
        # These calls stop nothing: the unit does not exist, and the option is refused.
        "st": ["nosuch.service", 0],
        "ta{sv}": [0, {"start-time": ("t", 1)}],
    }
    for path, name in (("/org/qkilld1", "org.qkilld1.Manager"), (job, "org.qkilld1.Job")):
        interface = ET.parse(TOP / "dbus" / f"{name}.xml").getroot().find("interface")
        assert interface is not None
        (values,) = client.call(
            "GetAll", "s", name, path=path, interface="org.freedesktop.DBus.Properties"
        )
        assert {key: kind for key, (kind, _) in values.items()} == {
            p.attrib["name"]: p.attrib["type"] for p in interface.iterfind("property")
        }
        for method in interface.iterfind("method"):
            takes = "".join(
                a.attrib["type"] for a in method.iterfind("arg") if a.attrib["direction"] == "in"
            )
            try:
                if method.attrib["name"] != "Wait":
                    client.call(
                        method.attrib["name"], takes, *bodies[takes], path=path, interface=name
                    )
            except CallError as error:
                assert error.name.startswith("org.qkilld1.Error."), error


@pytest.mark.each_library
def test_the_tree_can_be_walked(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    client.terminate(fake_qemu().pid)
    tree = daemon.bus.busctl("tree", "--list", "org.qkilld1").stdout.split()
    assert tree == ["/", "/org", "/org/qkilld1", "/org/qkilld1/job", "/org/qkilld1/job/1"]


def test_version_and_ping(client: Client) -> None:
    assert client.properties()["Version"] == __version__
    peer = "org.freedesktop.DBus.Peer"
    assert client.call("Ping", interface=peer) == ()
    assert len(client.call("GetMachineId", interface=peer)[0]) == 32


def test_it_ends_in_good_order(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, 1)
    serial = client.send("Wait", path=job, interface="org.qkilld1.Job")
    assert client.call("ListJobs")[0]
    assert daemon.stop() == 0
    # Callers of Wait get an error, and the guest is left alone.
    assert client.reply(serial)[0] == "cancelled"
    assert guest.alive
    daemon.wait_for("qkilld is stopping; 1 jobs are cancelled")


def test_the_bus_goes_away_during_a_job(
    private_bus: Bus, start_daemon: Start, fake_qemu: Make
) -> None:
    daemon = start_daemon()
    guest = fake_qemu(stubborn=True, name="web")
    with private_bus.client() as client:
        client.terminate(guest.pid, 1, grace_usec=("t", 1_000_000))
        private_bus.stop()
    # The daemon exits only after the end of the job.
    assert guest.wait_gone() == -9
    assert daemon.wait_gone() == 1
    daemon.wait_for(r"^error: qkilld has lost the bus .*: 1 jobs continue, after which it exits")
    daemon.wait_for(r'^Guest "web" .* was killed after [1-9]\.\d+ s')


def test_the_bus_goes_away_without_a_job(private_bus: Bus, start_daemon: Start) -> None:
    daemon = start_daemon()
    private_bus.stop()
    assert daemon.wait_gone() == 1
    daemon.wait_for("no job is running")


@pytest.mark.each_library
def test_the_ends_of_jobs_are_announced_under_the_bus_name(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    jobs = {client.terminate(fake_qemu(stubborn=True).pid) for _ in range(10)}
    client.subscribe()
    daemon.stop()
    assert {client.signal("JobRemoved", 10)[1][1] for _ in jobs} == jobs


def test_a_second_daemon_says_so_and_ends(daemon: Daemon, start_daemon: Start) -> None:
    second = start_daemon(ready=False)
    assert second.wait_gone() == 1
    second.wait_for("another process has the name org.qkilld1 on this bus already")
    with daemon.bus.client() as client:
        assert client.properties()["Version"] == __version__


def test_no_bus_there(lab_dir: Path) -> None:
    address = f"unix:path={lab_dir}/nothing"
    done = run([*PYTHON, "-m", "qkilld", "--bus", address], env=environment(address))
    assert done.returncode == 1
    assert done.stderr.startswith(f"qkilld: cannot connect to the bus at {address}: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def rude_bus(lab_dir: Path) -> Iterator[str]:
    """A socket that hangs up during authentication."""
    path = lab_dir / "rude"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield f"unix:path={path}"
        thread.join()


def test_a_bus_that_hangs_up(rude_bus: str) -> None:
    done = run([*PYTHON, "-m", "qkilld", "--bus", rude_bus], env=environment(rude_bus), timeout=20)
    assert done.returncode == 1
    assert "cannot connect" in done.stderr


def test_a_bad_address() -> None:
    done = run([*PYTHON, "-m", "qkilld", "--bus", "nonsense"], env=environment("nonsense"))
    assert done.returncode == 1
    assert "cannot connect to the bus at nonsense" in done.stderr
    assert "Traceback" not in done.stderr


BROKEN = "[Policy]\nGraceSec=10s\nGarceSec=5s\nReapSec=soon\n"


def test_a_broken_configuration(private_bus: Bus, start_daemon: Start, lab_dir: Path) -> None:
    path = write_config(lab_dir, BROKEN)
    daemon = start_daemon(root=lab_dir, ready=False)
    assert daemon.wait_gone() == 2
    daemon.wait_for(rf"^{path}:3: .*GarceSec.*GraceSec")
    daemon.wait_for(rf"^{path}:4: .*ReapSec")
    with private_bus.client() as client, pytest.raises(CallError, match="ServiceUnknown"):
        client.properties()


@pytest.fixture
def copied(lab_dir: Path) -> Path:
    """A copy of the installed program, for tests to damage."""
    shutil.copytree(
        TOP / "qkilld", lab_dir / "qkilld", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(TOP / "dbus", lab_dir / "qkilld/interfaces")
    return lab_dir


def test_the_daemon_runs_on_while_it_is_uninstalled(
    private_bus: Bus, start_daemon: Start, copied: Path, fake_qemu: Make
) -> None:
    start_daemon(env={"PYTHONPATH": str(copied)})
    shutil.rmtree(copied / "qkilld/interfaces")
    with private_bus.client() as client:
        job = client.terminate(fake_qemu().pid)
        assert client.wait(job)[0] == "exited"
        assert client.properties(job, "org.qkilld1.Job")["Result"] == "exited"


def test_an_interface_that_cannot_be_read(start_daemon: Start, copied: Path) -> None:
    path = copied / "qkilld/interfaces/org.qkilld1.Job.xml"
    whole = path.read_text()
    for text in (whole[:500], "<node/>", None):
        path.unlink() if text is None else path.write_text(text)
        daemon = start_daemon(env={"PYTHONPATH": str(copied)}, ready=False)
        assert daemon.wait_gone() == 2
        daemon.wait_for("the description of org.qkilld1.Job cannot be read: .*install qkilld anew")
        assert "Traceback" not in daemon.stderr.text()


def test_check_config(lab_dir: Path) -> None:
    check = [*PYTHON, "-m", "qkilld", "--check-config", "--root", str(lab_dir)]
    write_config(lab_dir, lab_config())
    done = run(check)
    assert (done.returncode, done.stdout) == (0, "The configuration is good.\n")
    write_config(lab_dir, BROKEN)
    done = run(check)
    assert done.returncode == 2
    assert ":3:" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["--user", "--bus", "x"], ["stray"], ["--exit-idle", "x"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = run([*PYTHON, "-m", "qkilld", *arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("usage: qkilld")
    assert "_" not in done.stderr


def test_help_teaches() -> None:
    done = run([*PYTHON, "-m", "qkilld", "--help"])
    assert done.returncode == 0
    assert "busctl call org.qkilld1" in done.stdout


def test_user_is_the_session_bus(private_bus: Bus, lab_dir: Path) -> None:
    """--user uses only the bus in DBUS_SESSION_BUS_ADDRESS."""
    address = f"unix:path={lab_dir}/session"
    env = environment("unix:path=/nonexistent/system") | {"DBUS_SESSION_BUS_ADDRESS": address}
    done = run([*PYTHON, "-m", "qkilld", "--user"], env=env)
    assert done.returncode == 1
    assert "cannot connect to the session bus" in done.stderr
    env["DBUS_SYSTEM_BUS_ADDRESS"] = f"unix:path={lab_dir}/system"
    done = run([*PYTHON, "-m", "qkilld"], env=env)
    assert "cannot connect to the system bus" in done.stderr


def test_without_the_files_of_the_system(lab_dir: Path) -> None:
    """If pip or pipx installed the daemon, it reports which files are missing, and where the
    documentation is."""
    needed = {
        "usr/share/dbus-1/system.d/org.qkilld1.conf": False,
        "etc/systemd/system/qkilld.service": True,
        "usr/share/dbus-1/system-services/org.qkilld1.service": False,
        "usr/share/polkit-1/actions/org.qkilld1.policy": False,
    }
    for path, there in needed.items():
        (lab_dir / path).parent.mkdir(parents=True)
        if there:
            (lab_dir / path).touch()
    with private_bus_of(policy='<deny own="org.qkilld1"/>') as bus:
        daemon = [*PYTHON, "-m", "qkilld", "--root", str(lab_dir)]
        done = run(daemon, env=environment(bus.address))
    assert done.returncode == 1
    assert f"does not let uid {os.geteuid()} own the name" in done.stderr
    for path, there in needed.items():
        assert (f"{lab_dir}/{path}" in done.stderr) is not there, done.stderr
    assert "Documentation: qkilld(8)" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_tls_is_loaded(daemon: Daemon) -> None:
    """asyncio imports ssl if possible. This would take 18 ms at every start, and 4 MB of
    memory, which is locked while jobs run."""
    assert not re.search(r"/libssl\b", Path(f"/proc/{daemon.pid}/maps").read_text())


def test_all_threads_allocate_from_one_heap(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    """With a heap for each thread, a million hostile messages took 6 MB more."""
    client.terminate(fake_qemu(stubborn=True).pid)
    client.call("ListGuests")
    assert len(psutil.Process(daemon.pid).threads()) > 1
    # glibc reserves 64 MiB for each further heap, at an address that is a multiple of 64 MiB
    # (malloc/arena.c).
    size = 64 << 20
    ends: dict[int, int] = {}
    for line in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
        ends[start] = end
    heaps = [start for start in ends if start % size == 0 and ends.get(ends[start]) == start + size]
    assert heaps == []
