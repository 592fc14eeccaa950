"""Guests that libvirt starts, in a throwaway system (tests.lab.container).

libvirt sets the memory and the machine type, and passes all other arguments to QEMU unchanged. So
the guest is the same as without libvirt, and can be continued from a saved state.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import peer
from tests.lab import container
from tests.lab.bare import BareGuest, halting_firmware
from tests.lab.process import Orphan
from tests.safety.contained import ContainerPolicy
from tests.shutdown.scene import GuestHandle

NAME: Final = "lab"
_KEEP: Final = """
import sys
from tests.bench import peer
with peer.libvirtd():
    print("up", flush=True)
    for xml in sys.stdin:
        peer.virsh("create", xml.strip())
        print("created", flush=True)
"""
_ARGUMENTS: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_ASK_S: Final = 30
_DESTROY_S: Final = 60


@dataclass(frozen=True)
class LibvirtDomain:
    """Implements scene.Domain."""

    system: container.Container
    pid: int
    """The process id in the system's PID namespace."""

    def shutdown(self) -> None:
        self._virsh("shutdown", _ASK_S)

    def destroy(self) -> None:
        self._virsh("destroy", _DESTROY_S)

    def terminate(self, timeout_s: float) -> dict[str, object]:
        words = ("qkillctl", "--json", "terminate", "--powerdown", "--force", "--wait")
        result = self.system.run(*words, str(self.pid), timeout=timeout_s, check=False)
        (document,) = json.loads(result.stdout)
        assert isinstance(document, dict), result
        return document

    def _virsh(self, command: str, timeout_s: float) -> None:
        # Ignore failures here, because the guest's end shows them.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.system.run("virsh", "-c", peer.URI, command, NAME, timeout=timeout_s, check=False)


class Libvirt:
    """Implements scene.Launcher."""

    def __init__(self, system: container.Container) -> None:
        self._system = system

    @contextlib.contextmanager
    def bare(
        self, directory: Path, words: Sequence[str]
    ) -> Iterator[tuple[BareGuest, GuestHandle]]:
        monitor = directory / "monitor"
        own = ["-chardev", f"socket,id=lab,path={monitor},server=on,wait=off"]
        own += ["-mon", "chardev=lab,mode=control", "-bios", str(halting_firmware(directory))]
        with (
            self._started(directory, [*own, *words], memory=16) as (target, orphan),
            socket.socket(socket.AF_UNIX) as connection,
        ):
            connection.settimeout(60)
            connection.connect(str(monitor))
            guest = BareGuest(orphan, connection)
            try:
                yield guest, target
            finally:
                guest.close()

    @contextlib.contextmanager
    def start(self, directory: Path, words: Sequence[str]) -> Iterator[GuestHandle]:
        with self._started(directory, words, memory=256) as (target, _):
            yield target

    @contextlib.contextmanager
    def _started(
        self, directory: Path, words: Sequence[str], *, memory: int
    ) -> Iterator[tuple[GuestHandle, Orphan]]:
        ContainerPolicy(self._system).show_storage()
        description = directory / "domain.xml"
        description.write_text(_description(words, memory))
        keep = (container.PYTHON, "-c", _KEEP)
        with (
            (directory / "said").open("wb") as said,
            self._system.spawn(*keep, stdin=subprocess.PIPE, stderr=said) as keeper,
        ):
            assert keeper.stdin is not None and keeper.stdout is not None
            keeper.stdin.write(f"{description}\n".encode())
            keeper.stdin.flush()
            for expected in (b"up\n", b"created\n"):
                line = keeper.stdout.readline()
                assert line == expected, self._said(directory)
            inside = int(self._system.run("cat", f"/run/libvirt/qemu/{NAME}.pid").stdout)
            orphan = Orphan(self._system.outside(inside))
            try:
                yield (
                    GuestHandle(orphan.pid, orphan.pidfd, LibvirtDomain(self._system, inside)),
                    orphan,
                )
            finally:
                orphan.kill()

    def _said(self, directory: Path) -> str:
        log = self._system.run("cat", f"/var/log/libvirt/qemu/{NAME}.log", check=False)
        return (directory / "said").read_text() + log.stdout


@contextlib.contextmanager
def libvirt(*, installed: bool) -> Iterator[Libvirt]:
    """Boot a system with libvirt, and with qkilld if `installed`. Raises needs.Missing."""
    peer.programs()
    with container.boot() as system:
        if installed:
            container.install(system)
            system.run("systemctl", "start", "qkilld.service")
        yield Libvirt(system)


def _description(words: Sequence[str], memory: int) -> str:
    ET.register_namespace("qemu", _ARGUMENTS)
    top = ET.Element("domain", type="qemu")
    ET.SubElement(top, "name").text = NAME
    ET.SubElement(top, "memory", unit="MiB").text = str(memory)
    ET.SubElement(top, "vcpu").text = "1"
    backing = ET.SubElement(top, "memoryBacking")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")
    system = ET.SubElement(top, "os")
    ET.SubElement(system, "type", arch="x86_64", machine="pc").text = "hvm"
    ET.SubElement(ET.SubElement(top, "features"), "acpi")
    # By default, libvirt destroys a guest that panics.
    ET.SubElement(top, "on_crash").text = "preserve"
    devices = ET.SubElement(top, "devices")
    ET.SubElement(devices, "emulator").text = "/usr/bin/qemu-system-x86_64"
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    arguments = ET.SubElement(top, f"{{{_ARGUMENTS}}}commandline")
    for word in words:
        ET.SubElement(arguments, f"{{{_ARGUMENTS}}}arg", value=word)
    return ET.tostring(top, encoding="unicode")
