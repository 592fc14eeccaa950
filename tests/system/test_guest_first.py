"""Guests in real units are asked before they are stopped, by the installed daemon and helper."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.model.event import MessageId
from qkilld.unitcheck.command import quoted
from tests.evidence.until import until
from tests.lab.container import Container
from tests.lab.debian import FILES, Shell, continued, kept_files, write_files
from tests.lab.process import OTHER_UID
from tests.lab.scratch import scratch
from tests.lab.storage import nbd_server
from tests.safety.contained import ContainerPolicy

TARGET = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
POWERDOWN = 4
QEMU = "/usr/bin/qemu-system-x86_64 -nodefaults -no-user-config -display none"
FIRMWARE = f"{QEMU} -M pc -accel tcg -m 32"
"""A guest without an operating system. Nothing listens to its power button, and it is idle after a
second."""
KILLS = int(os.environ.get("LAB_KILLS", "8"))
"""How often the daemon is killed while QEMU hangs during its exit. With 200, the test takes some
minutes."""
DROP_IN = "/run/systemd/system/qkilld.service.d/guest-first.conf"


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    installed.write("/etc/qkilld/qkilld.conf", "")
    installed.run("systemctl", "restart", "qkilld.service")
    ContainerPolicy(installed).show_storage()
    yield installed
    installed.run("systemctl", "stop", "qkilld.service")


@contextlib.contextmanager
def unit(system: Container, name: str, command: str, *lines: str) -> Iterator[str]:
    """A unit that runs a guest, with these lines added to [Service]."""
    text = "\n".join(["[Service]", f"ExecStart={command}", *lines])
    system.write(f"/run/systemd/system/{name}.service", f"{text}\n")
    system.run("systemctl", "start", f"{name}.service")
    try:
        yield f"{name}.service"
    finally:
        system.run("systemctl", "kill", "--signal=KILL", f"{name}.service", check=False)
        system.run("rm", "-f", f"/run/systemd/system/{name}.service")


def call(system: Container, member: str, *arguments: str) -> Any:
    done = system.run("busctl", "--json=short", "call", *TARGET, member, *arguments)
    return json.loads(done.stdout)["data"]


def terminate(system: Container, unit: str, flags: int, **spans_s: int) -> str:
    options = [
        word
        for name, span in spans_s.items()
        for word in (f"{name.replace('_', '-')}-usec", "t", str(span * 1_000_000))
    ]
    pid = system.property(unit, "MainPID")
    signature = ("TerminateWithOptions", "uta{sv}", pid, str(flags))
    (path,) = call(system, *signature, str(len(spans_s)), *options)
    return str(path)


def wait(system: Container, job: str) -> tuple[str, dict[str, Any]]:
    name = ("org.qkilld1", job, "org.qkilld1.Job", "Wait")
    done = system.run("busctl", "--json=short", "--timeout=90", "call", *name, timeout=100)
    result, receipt = json.loads(done.stdout)["data"]
    return result, {key: value["data"] for key, value in receipt.items()}


def kill_daemon(system: Container) -> None:
    system.run("kill", "-KILL", system.property("qkilld.service", "MainPID"))


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("/run/first/own/monitor", ("RuntimeDirectory=first/own", "RuntimeDirectoryMode=0700")),
        ("/tmp/monitor", ("PrivateTmp=yes",)),
    ],
    ids=["0700", "PrivateTmp"],
)
@pytest.mark.parametrize("monitor", ["-qmp", "-monitor"])
def test_the_monitor_of_another_user_is_reached(
    system: Container, place: str, lines: tuple[str, ...], monitor: str
) -> None:
    """The daemon can ask the guest, although the daemon has a sandbox."""
    command = f"{FIRMWARE} {monitor} unix:{place},server=on,wait=off"
    with unit(system, "reached", command, f"User={OTHER_UID}", *lines) as name:
        until(lambda: call(system, "ListGuests")[0], bool)
        result, receipt = wait(system, terminate(system, name, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "deaf")


@pytest.mark.timeout(900)
def test_systemctl_stop_loses_nothing_that_the_guest_had_written(system: Container) -> None:
    """The README's example. The guest takes longer than its unit's timeout."""
    with scratch("u") as directory:
        qmp = ["-qmp", "unix:/run/debian-first/qmp,server=on,wait=off"]
        arguments = [*shlex.split(QEMU), "-name", "debian", *qmp, *continued(directory)]
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, OTHER_UID, OTHER_UID)
        lines = [f"User={OTHER_UID}"]
        lines += ["RuntimeDirectory=debian-first", "RuntimeDirectoryMode=0700"]
        with unit(system, "debian", " ".join(map(quoted, arguments)), *lines) as name:
            until((directory / "shell").exists, bool)
            shell = Shell(directory / "shell")
            shell.wait_until_there()
            system.run("qkillctl", "adopt", name)
            # The timeout is so short that the guest keeps its data only if the timeout is extended.
            system.write(f"/run/systemd/system/{name}.d/99.conf", "[Service]\nTimeoutStopSec=3\n")
            system.run("systemctl", "daemon-reload")
            try:
                # Make the end of the guest's shutdown slow.
                slow = "--property=RemainAfterExit=yes --property=ExecStop='/bin/sleep 4'"
                shell.run(f"systemd-run {slow} /bin/true")
                write_files(shell)
                stop_and_follow(system, name)
            finally:
                shell.close()
                system.run("qkillctl", "adopt", "--undo", name)
        assert kept_files(directory / "data.qcow2") == (FILES, True)
    (entry,) = system.journal(
        f"OBJECT_SYSTEMD_UNIT={name}", f"MESSAGE_ID={MessageId.JOB_ENDED.value}"
    )
    assert (entry["QKILLD_RESULT"], entry["QKILLD_GUEST_ASKED"]) == ("exited", "shut-down")
    # The guest shut down before any signal. QEMU may get SIGTERM, but only while it exits by
    # itself.


def stop_and_follow(system: Container, name: str) -> None:
    """Run systemctl stop. During the stop, the unit's status says what the guest does. The stop
    succeeds, no matter how long it takes."""
    said = set()
    began = time.monotonic()
    with system.spawn("systemctl", "stop", name) as stopping:
        while stopping.poll() is None:
            said.add(system.property(name, "StatusText"))
            time.sleep(0.1)
    assert stopping.returncode == 0
    took = time.monotonic() - began
    print(f"stopped in {took:.1f} s; STATUS= was {sorted(said)}")
    assert (system.property(name, "Result"), took > 3) == ("success", True)
    assert any("shut" in text for text in said), said


def test_out_of_band_outlives_the_daemon(system: Container) -> None:
    """After SIGTERM, QEMU does not answer new connections. So the next daemon uses the connection
    that systemd has kept."""
    lines = "StartLimitIntervalSec=0\n[Service]\nEnvironment=SYSTEMD_LOG_LEVEL=debug"
    system.write(DROP_IN, f"[Unit]\n{lines}\n")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "restart", "qkilld.service")
    with scratch("n") as directory:
        dead = directory / "dead.raw"
        dead.write_bytes(bytes(1 << 20))
        try:
            with nbd_server(dead) as server:
                hang_and_kill(system, server.uri, directory, server.freeze)
        finally:
            system.run("rm", DROP_IN)
            system.run("systemctl", "daemon-reload")
            system.run("systemctl", "restart", "qkilld.service")


def hang_and_kill(system: Container, uri: str, directory: Path, freeze: Any) -> None:
    monitors = f"-qmp unix:{directory}/qmp,server=on,wait=off"
    monitors += f" -monitor unix:{directory}/hmp,server=on,wait=off"
    command = f"{FIRMWARE} {monitors} -drive file={uri},if=none,id=dead,format=raw"
    with unit(system, "hangs", command) as name:
        until((directory / "hmp").exists, bool)
        tell = ("python3", "-c", TELL, f"{directory}/hmp")
        system.run(*tell, "info status")  # QEMU has opened its disk when it answers
        freeze()
        system.run(*tell, 'qemu-io dead "aio_write 0 64k"')
        job = terminate(system, name, POWERDOWN, storage_stall=3600)
        until(lambda: phase(system, job), lambda found: found == "terminate")
        system.run("journalctl", "--rotate")
        system.run("journalctl", "--vacuum-time=1s")
        for number in range(KILLS):
            kill_daemon(system)
            until(lambda: adopted(system), (number + 1).__eq__)
        assert phase(system, job) == "terminate"
        # systemd keeps the pidfd and the connection.
        assert system.property("qkilld.service", "NFileDescriptorStore") == "2"
        system.run("systemctl", "kill", "--signal=KILL", name)
        assert wait(system, job)[0] == "exited"
        until(lambda: system.property("qkilld.service", "NFileDescriptorStore"), "0".__eq__)


def phase(system: Container, job: str) -> str:
    name = ("org.qkilld1", job, "org.qkilld1.Job", "Phase")
    return str(
        json.loads(system.run("busctl", "--json=short", "get-property", *name).stdout)["data"]
    )


def adopted(system: Container) -> int:
    """Return how many daemons got an answer on the saved connection."""
    lines = system.run("journalctl", "-u", "qkilld.service", "-o", "cat", "--no-pager").stdout
    return lines.count("adopting a stored monitor connection: it answers")


TELL = """
import socket, sys
with socket.socket(socket.AF_UNIX) as monitor:
    monitor.connect(sys.argv[1])
    said = b""
    while not said.endswith(b"(qemu) "):
        said += monitor.recv(4096)
    monitor.sendall(sys.argv[2].encode() + b"\\n")
    said = b""
    while not said.endswith(b"(qemu) "):
        said += monitor.recv(4096)
"""
