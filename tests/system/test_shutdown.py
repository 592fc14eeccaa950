"""A host shuts down with guests in different places, while their storage is slow."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import container as lab_container
from tests.lab import needs
from tests.lab.container import CHECKOUT, Container
from tests.lab.guest import make_disk
from tests.lab.image import guest_image
from tests.lab.log import Log
from tests.lab.process import TOP, end, spawn, wait_gone
from tests.lab.records import records
from tests.lab.storage import NbdServer, nbd_server

RECORDS, PASSES = 240, 3
SLOW = "100K"
"""A rate in bits per second. At this rate, a writer's last writes (5 L2 tables) take about 15 s."""

LINGER = """\
[Unit]
Before=qkilld-guests.service adopted.service qemu-guest@templated.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sleep 2
"""
"""This unit is stopped after the guests, and delays the end of the shutdown by 2 s, because
journalctl --follow gets an entry 250 ms late."""


@dataclass
class Writer:
    """A guest whose disk has acknowledged records that QEMU has not yet written to the storage."""

    name: str
    image: Path
    server: NbdServer

    @property
    def serial(self) -> str:
        return f"/var/lib/qemu-guest/{self.name}/serial"

    @property
    def options(self) -> list[tuple[str, str]]:
        image = guest_image()
        job = f"lab.job=writer lab.records={RECORDS} lab.stride={32 << 20} lab.passes={PASSES}"
        return [
            ("-machine", "pc,accel=tcg"),
            ("-m", "96"),
            ("-name", self.name),
            ("-kernel", str(image.kernel).replace(str(TOP), CHECKOUT)),
            ("-initrd", str(image.initramfs).replace(str(TOP), CHECKOUT)),
            ("-append", f"console=ttyS0 quiet panic=-1 nokaslr {job}"),
            ("-serial", f"file:{self.serial}"),
            ("-drive", f"file={self.server.uri},if=none,id=d0,format=qcow2,cache=writeback"),
            ("-device", "nvme,drive=d0,serial=lab"),
        ]

    @property
    def command(self) -> list[str]:
        words = [word for option in self.options for word in option]
        return ["/usr/bin/qemu-system-x86_64", "-nodefaults", "-display", "none", *words]


@pytest.fixture
def host() -> Iterator[Container]:
    """A host for one test only."""
    with lab_container.boot() as booted:
        lab_container.install(booted)
        booted.run("groupadd", "--system", "--force", "kvm")
        booted.write("/etc/systemd/system/lab-linger.service", LINGER)
        booted.run("systemctl", "daemon-reload")
        units = ("qkilld.service", "qkilld-guests.service", "lab-linger.service")
        booted.run("systemctl", "start", *units)
        yield booted


@contextlib.contextmanager
def writer(host: Container, directory: Path, name: str) -> Iterator[Writer]:
    """Run a writer whose storage is outside of the host."""
    image = make_disk(directory / name, size="4G")
    with contextlib.ExitStack() as stack:
        with host.network():
            server = stack.enter_context(nbd_server(image, tcp=True, room=64 << 20))
        yield Writer(name, image, server)


@contextlib.contextmanager
def held_by_a_debugger(host: Container, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a QEMU outside of any unit. A debugger stops it, so that only SIGKILL takes effect. Yield
    the debugger. The killed QEMU can exit only after the debugger has exited. `name` must be unique
    on this machine."""
    gdb = str(needs.program("gdb", "gdb"))
    # Make the process a child of the host's first process, which reaps it.
    qemu = "setsid --fork qemu-system-x86_64 -M none -nodefaults -display none -name"
    host.run("sh", "-c", f'{qemu} "$1" >/dev/null 2>&1', "sh", name)
    with contextlib.ExitStack() as stack:
        pid = wait_for_process(b"-name\0" + name.encode() + b"\0")
        debugger = spawn(
            [gdb, "-q", "-nx", "-p", str(pid), "-ex", "echo HELD\\n"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        stack.callback(end, debugger)
        assert debugger.stdout is not None
        assert any(b"HELD" in line for line in debugger.stdout)
        yield debugger


def wait_for_process(words: bytes) -> int:
    """Wait for a QEMU whose command line ends in `words`; return its pid on this machine."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for command_line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if command_line.read_bytes().endswith(words):
                    comm = command_line.with_name("comm").read_text()
                    if comm.startswith("qemu-system"):
                        return int(command_line.parent.name)
        time.sleep(0.05)
    raise AssertionError("it was not started")


@pytest.mark.parametrize("how", ["poweroff", "reboot"])
def test_nothing_is_lost_and_the_stuck_one_is_named(
    host: Container, lab_dir: Path, how: str
) -> None:
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writer(host, lab_dir, name))
            for name in ("templated", "adopted", "scoped")
        ]
        templated, adopted, scoped = writers
        lines = "".join(f"{option} {value}\n" for option, value in templated.options)
        host.write("/etc/qkilld/guests/templated.conf", f"-nodefaults\n{lines}")
        host.write(
            "/etc/systemd/system/adopted.service",
            f"[Service]\nExecStart={shlex.join(adopted.command)}\nTimeoutStopSec=5\n",
        )
        for one in (adopted, scoped):
            host.run("mkdir", "-p", str(Path(one.serial).parent))
        host.run("systemctl", "daemon-reload")
        host.run("qkillctl", "adopt", "adopted.service")
        host.run("systemctl", "start", "adopted.service", "qemu-guest@templated.service")
        options = ("--scope", "--unit=scoped.scope", "--property=TimeoutStopSec=5")
        stack.enter_context(host.spawn("systemd-run", *options, *scoped.command))
        stuck = f"stuck-{lab_dir.name}"
        debugger = stack.enter_context(held_by_a_debugger(host, stuck))
        for one in writers:
            wait = 'until grep -q "WRITER DONE" "$1"; do sleep 0.1; done'
            host.run("sh", "-c", wait, "sh", one.serial, timeout=90)
            one.server.rate(SLOW)
        journal = Log(lab_dir / "journal")
        with journal.path.open("wb") as file:
            # journalctl must not be a child of nsenter. systemd-shutdown sends SIGSTOP to all
            # processes. When its child stops, nsenter stops itself, so it would never reap the
            # child.
            follow = ("setsid", "--fork", "journalctl", "--follow", "--lines=all")
            with host.spawn(*follow, stdout=file) as started:
                started.wait(30)
        leader = os.pidfd_open(host.leader)
        stack.callback(os.close, leader)
        host.run("systemctl", "--no-block", how)
        journal.wait_for(f'Sent SIGKILL to guest "{stuck}"', 60, pidfd=leader)
        end(debugger)
        assert wait_gone(leader, 120), f"it is still up:\n{journal.text()}"
        said = journal.text()
    for one in writers:
        assert records(one.image) == set(range(RECORDS)), f"{one.name}\n{said}"
        took = re.search(rf'Guest "{one.name}" \(process \d+\) exited after ([\d.]+) s', said)
        assert took and float(took[1]) > 5, said
    # If a guest's own unit has an ExecStop=, this unit stops the guest.
    for name, unit in (
        ("templated", "qemu-guest@templated.service"),
        ("adopted", "adopted.service"),
        ("scoped", "qkilld-guests.service"),
        (stuck, "qkilld-guests.service"),
    ):
        told = rf'Stopping guest "{name}" \(process \d+\) .*"ExecStop of {unit}"'
        assert len(re.findall(told, said)) == 1, said
    assert said.count("Sent SIGKILL to") == 1
    assert re.search(rf'Guest "{stuck}" \(process \d+\) was killed after', said)
    # One entry sums up all stops.
    assert re.search(r"Stopped \d guests in [\d.]+ s: \d exited", said), said
