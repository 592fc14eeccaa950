"""A cell's QEMU: its command line, and its process."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.guest import QEMU
from tests.lab.image import guest_image
from tests.lab.log import Log, WaitTimeout
from tests.lab.process import wait_gone

BOOT_TIMEOUT_S: Final = 180


@dataclass(frozen=True)
class Machine:
    """A Linux guest that sees these disks as NVMe disks."""

    directory: Path
    """The directory of the machine, with the log of its serial line."""
    drives: Sequence[str]
    """The arguments of -drive, without if= and id=."""
    job: str
    """`lab.KEY=VALUE` words for the kernel command line."""
    memory: int = 128
    """MiB."""
    name: str = "lab"
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def serial(self) -> Path:
        return self.directory / "serial"

    @property
    def command_line(self) -> str:
        """The kernel command line."""
        return f"console=ttyS0 quiet panic=-1 nokaslr no_timer_check {self.job}"

    def said(self) -> str:
        """Return QEMU's messages if they are stored in the directory, otherwise ""."""
        path = self.directory / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def disks(self) -> list[str]:
        """Return QEMU's arguments for the disks."""
        arguments = []
        for number, drive in enumerate(self.drives):
            arguments += ["-drive", f"{drive},if=none,id=d{number}"]
            arguments += ["-device", f"nvme,drive=d{number},serial=lab{number}"]
        return arguments

    def argv(self) -> list[str]:
        """Return the whole command line. Raises needs.Missing."""
        image = guest_image()
        return [
            *(str(needs.program(QEMU, "qemu-system-x86").resolve()), "-name", f"guest={self.name}"),
            *("-uuid", self.uuid, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-M", "pc", "-accel", "tcg", "-m", str(self.memory), "-no-reboot"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", self.command_line, "-serial", f"file:{self.serial}"),
            *self.disks(),
        ]


@dataclass
class Target:
    """A running QEMU, which may be the child of another process."""

    machine: Machine
    pid: int
    """The process id in this process's PID namespace."""
    pidfd: int

    @classmethod
    def find(cls, machine: Machine, timeout: float = 30) -> Target:
        """Wait for a process with the machine's UUID among its arguments."""
        deadline = time.monotonic() + timeout
        wanted = f"\0{machine.uuid}\0".encode()
        while True:
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and (pid := int(entry.name)) != os.getpid():
                    try:
                        name = (entry / "comm").read_text()
                        words = (entry / "cmdline").read_bytes()
                    except OSError:
                        continue
                    if name.startswith("qemu-system") and wanted in words:
                        return cls(machine, pid, os.pidfd_open(pid))
            assert time.monotonic() < deadline, f"there is no QEMU with the UUID {machine.uuid}"
            # Poll, because nothing reports the start of a process in another namespace.
            time.sleep(0.05)

    def wait_for(self, pattern: str) -> None:
        """Wait for a match on the serial line. Raises AssertionError at the timeout, or if the
        guest prints an error."""
        try:
            found = Log(self.machine.serial).wait_for(
                f"{pattern}|^GUEST ERROR.*$", BOOT_TIMEOUT_S, pidfd=self.pidfd
            )[0]
        except WaitTimeout as error:
            raise AssertionError(f"{error}\nQEMU says: {self.machine.said()}") from None
        assert not found.startswith("GUEST ERROR"), found

    def acknowledged(self) -> int:
        """Return the number of records that the guest's disks have acknowledged."""
        return Log(self.machine.serial).text().count("ACK ")

    @property
    def alive(self) -> bool:
        return not wait_gone(self.pidfd, 0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. Raises ProcessLookupError if the process is gone."""
        signal.pidfd_send_signal(self.pidfd, number)

    def state(self) -> str:
        """Return the state of the main thread, proc(5)."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat[stat.rindex(")") + 2]
