"""Guests of libvirt. libvirt uses their monitors, so virsh asks them, and qkilld waits for them."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.bench import peer
from tests.lab.container import PYTHON, Container
from tests.lab.log import Log
from tests.lab.scratch import scratch
from tests.safety.contained import ContainerPolicy

KEEP = """
import sys
from tests.bench import peer
with peer.libvirtd():
    print("up", flush=True)
    for xml in sys.stdin:
        peer.virsh("create", xml.strip())
        print("created", flush=True)
"""
"""A program that runs libvirtd, and starts a domain for each description that it reads."""


@pytest.fixture(scope="module")
def libvirt(installed: Container) -> Iterator[subprocess.Popen[bytes]]:
    peer.programs()
    installed.write("/etc/qkilld/qkilld.conf", "")
    installed.run("systemctl", "restart", "qkilld.service")
    ContainerPolicy(installed).show_storage()
    with installed.spawn(PYTHON, "-c", KEEP, stdin=subprocess.PIPE, stderr=None) as keeper:
        assert keeper.stdout is not None and keeper.stdout.readline() == b"up\n"
        yield keeper
    installed.run("systemctl", "stop", "qkilld.service")


@contextlib.contextmanager
def domain(
    system: Container, libvirt: subprocess.Popen[bytes], name: str, power: str
) -> Iterator[str]:
    """Run a domain; `power` says how it reacts to its power button. Yield its pid in the
    container."""
    with scratch("v") as directory:
        serial = Log(directory / "serial")
        xml = directory / "xml"
        job = f"lab.job=power lab.power={power}"
        xml.write_text(peer.description_of(name, serial.path, job))
        assert libvirt.stdin is not None and libvirt.stdout is not None
        libvirt.stdin.write(f"{xml}\n".encode())
        libvirt.stdin.flush()
        assert libvirt.stdout.readline() == b"created\n"
        pid = system.run("cat", f"/run/libvirt/qemu/{name}.pid").stdout.strip()
        try:
            serial.wait_for("^GUEST READY", 120)
            yield pid
        finally:
            system.run("virsh", "-c", peer.URI, "destroy", name, check=False)


def test_the_helper_has_libvirt_ask_its_guest(
    installed: Container, libvirt: subprocess.Popen[bytes]
) -> None:
    with domain(installed, libvirt, "web", "off") as pid:
        done = installed.run("qkilld-stop", f"--pid={pid}", check=False)
        assert (done.returncode, "is gone" in done.stdout + done.stderr) == (0, True)
        # The guest got no signal, because the daemon had no job.
        jobs = json.loads(installed.run("qkillctl", "--json", "jobs").stdout)
        assert int(pid) not in [job["pid"] for job in jobs]


def test_qkillctl_has_libvirt_ask_its_guest(
    installed: Container, libvirt: subprocess.Popen[bytes]
) -> None:
    with domain(installed, libvirt, "shop", "off") as pid:
        said = installed.run("qkillctl", "terminate", "--powerdown", "--wait", pid).stdout
    assert "libvirt has asked it" in said and "its system has shut down" in said


def test_each_guest_is_asked_by_libvirt_or_qkilld(
    installed: Container, libvirt: subprocess.Popen[bytes]
) -> None:
    with domain(installed, libvirt, "mail", "off") as pid:
        command = ("qkillctl", "--json", "terminate", "--all", "--powerdown", "--wait")
        documents = json.loads(installed.run(*command).stdout)
    (document,) = [one for one in documents if one["pid"] == int(pid)]
    assert document["result"] == "exited"
    assert [rung["action"] for rung in document["receipt"]["rungs"]] == ["virsh"]


def test_a_guest_that_ignores_libvirt_gets_sigterm(
    installed: Container, libvirt: subprocess.Popen[bytes]
) -> None:
    with domain(installed, libvirt, "deaf", "nothing") as pid:
        plan = installed.run("qkillctl", "terminate", "--powerdown", "--dry-run", pid).stdout
        assert "libvirt holds the monitor; use virsh shutdown" in plan
        command = ("qkillctl", "--json", "terminate", "--powerdown", "--powerdown-sec=2s", "--wait")
        (document,) = json.loads(installed.run(*command, pid).stdout)
    assert document["result"] == "exited"
    assert [rung["action"] for rung in document["receipt"]["rungs"]] == ["SIGTERM"]


def test_the_configured_time_is_given(
    installed: Container, libvirt: subprocess.Popen[bytes]
) -> None:
    installed.write("/etc/qkilld/qkilld.conf", "[Guest dull]\nPowerdownSec=3s\n")
    try:
        with domain(installed, libvirt, "dull", "nothing") as pid:
            command = ("qkillctl", "--json", "terminate", "--powerdown-only", "--wait")
            (document,) = json.loads(installed.run(*command, pid, check=False).stdout)
    finally:
        installed.write("/etc/qkilld/qkilld.conf", "")
    assert document["result"] == "survived"
    assert 3_000_000 <= document["receipt"]["elapsed_usec"] < 30_000_000


def test_without_virsh_it_is_said(installed: Container, libvirt: subprocess.Popen[bytes]) -> None:
    with domain(installed, libvirt, "bare", "off") as pid:
        helper = ("/usr/bin/qkilld-stop", f"--pid={pid}")
        done = installed.run("env", "PATH=/nonexistent", *helper, check=False)
    assert done.returncode == 0
    assert "virsh is not installed" in done.stdout + done.stderr
