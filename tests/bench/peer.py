"""Run libvirtd in the throwaway system, and start and stop its guests."""

from __future__ import annotations

import contextlib
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.container import CHECKOUT
from tests.lab.image import guest_image
from tests.lab.log import Log, wait_for_path
from tests.lab.process import TOP, end, run, spawn
from tests.lab.scratch import scratch

PACKAGES: Final = "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
URI: Final = "qemu:///system"
_STATE: Final = Path("/run/libvirt/qemu")
_SOCKET: Final = Path("/run/libvirt/libvirt-sock")
_USER: Final = "libvirt-qemu"
"""libvirt's default user for QEMU. libvirt-daemon-system creates this user. Without the user,
libvirt's QEMU driver does not start."""

_HIDDEN: Final = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt")

_FILES: Final = {
    "/etc/libvirt/qemu.conf": (
        'security_driver = "none"\n'
        'user = "root"\n'
        'group = "root"\n'
        "cgroup_controllers = []\n"
        "remember_owner = 0\n"
        'stdio_handler = "file"\n'
        # QEMU starts a program to read the saved state of a guest.
        "seccomp_sandbox = 0\n"
    ),
    "/etc/libvirt/libvirtd.conf": 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n',
}


def programs() -> None:
    """Raises needs.Missing unless libvirt is installed."""
    needs.program("libvirtd", PACKAGES)
    needs.program("virsh", PACKAGES)


@dataclass(frozen=True, slots=True)
class Domain:
    """A running guest of libvirt."""

    name: str
    pid: int
    pidfd: int

    def wait_forgotten(self, timeout: float = 30) -> None:
        """Wait until libvirt has handled the exit, so that this work does not overlap the next
        measurement."""
        deadline = time.monotonic() + timeout
        while (_STATE / f"{self.name}.xml").exists():
            assert time.monotonic() < deadline, f"libvirt still has {self.name}"
            time.sleep(0.01)


@contextlib.contextmanager
def libvirtd() -> Iterator[None]:
    """Configure and run libvirtd without this machine's guests, networks, storage and hooks.

    This writes to /etc, /run and /var, so it refuses to run outside of a throwaway system.
    """
    if not Path("/run/host/container-manager").exists() or str(TOP) != CHECKOUT:
        raise RuntimeError("this is not the lab's throwaway system: run python -m tests.bench")
    for hidden in _HIDDEN:
        # Hide the state of this machine. Otherwise libvirtd would start its autostart guests a
        # second time, on the same storage.
        Path(hidden).mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", hidden], check=True)
    for path, text in _FILES.items():
        Path(path).write_text(text)
    _add_user()
    _SOCKET.parent.mkdir(exist_ok=True)
    with scratch("l") as directory:
        log = directory / "log"
        with log.open("wb") as written:
            process = spawn(
                [needs.program("libvirtd", PACKAGES)],
                stdout=written,
                stderr=written,
                env=os.environ | {"LIBVIRT_LOG_OUTPUTS": "3:stderr"},
            )
        pidfd = os.pidfd_open(process.pid)
        try:
            wait_for_path(_SOCKET, 30, pidfd=pidfd)
            # libvirtd listens at once, but answers only when its drivers are loaded.
            virsh("list")
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\nlibvirtd says:\n{log.read_text()}") from None
        finally:
            os.close(pidfd)
            end(process)


def _add_user() -> None:
    for path, rest in (("/etc/passwd", "::/nonexistent:/usr/sbin/nologin"), ("/etc/group", ":")):
        with Path(path).open("r+") as file:
            if not re.search(rf"^{_USER}:", file.read(), re.MULTILINE):
                file.write(f"{_USER}:x:64055{':64055' if 'passwd' in path else ''}{rest}\n")


def virsh(*arguments: str) -> str:
    """Run virsh; return what it prints. Raises AssertionError on failure."""
    program = needs.program("virsh", PACKAGES)
    return run([program, f"--connect={URI}", *arguments], check=True).stdout


@contextlib.contextmanager
def domains(names: list[str]) -> Iterator[list[Domain]]:
    """Start idle guests that run Linux, and wait until all have booted. The caller stops them."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("v"))
        booting = []
        for name in names:
            serial = Log(directory / f"{name}.serial")
            description = directory / f"{name}.xml"
            description.write_text(description_of(name, serial.path))
            virsh("create", str(description))
            pid = int((_STATE / f"{name}.pid").read_text())
            domain = Domain(name, pid, os.pidfd_open(pid))
            stack.callback(os.close, domain.pidfd)
            booting.append((domain, serial))
        for domain, serial in booting:
            serial.wait_for(r"^GUEST READY", 120, pidfd=domain.pidfd)
        yield [domain for domain, _ in booting]


def description_of(name: str, serial: Path, job: str = "lab.job=idle") -> str:
    """Return libvirt's XML of a guest that runs Linux with this job (tests.lab.guest)."""
    image = guest_image()
    domain = ET.Element("domain", type="qemu")
    ET.SubElement(domain, "name").text = name
    ET.SubElement(domain, "memory", unit="MiB").text = "96"
    ET.SubElement(domain, "vcpu").text = "1"
    system = ET.SubElement(domain, "os")
    ET.SubElement(system, "type", arch="x86_64", machine="pc").text = "hvm"
    ET.SubElement(system, "kernel").text = str(image.kernel)
    ET.SubElement(system, "initrd").text = str(image.initramfs)
    ET.SubElement(system, "cmdline").text = f"console=ttyS0 quiet panic=-1 nokaslr {job}"
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    devices = ET.SubElement(domain, "devices")
    ET.SubElement(devices, "emulator").text = "/usr/bin/qemu-system-x86_64"
    port = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(port, "source", path=str(serial))
    ET.SubElement(devices, "memballoon", model="none")
    return ET.tostring(domain, encoding="unicode")
