"""The guest of the corpus: Linux with records on its disks and records in its memory. It starts in
2 s.

The guest's first disk has acknowledged RECORDS records. If QEMU is killed, half of them are lost.
The guest has as many other records in its memory. It writes these to its second disk only when it
is asked to shut down, which takes HALT_S. So the images show how the guest was stopped.

The guest is booted once, and its state is saved before it has written anything. Otherwise, each
boot under TCG would take 4 s of processor time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.guest import make_disk
from tests.lab.image import CACHE, guest_image
from tests.lab.log import Log
from tests.lab.process import TOP, end, run, spawn
from tests.lab.qmp import Qmp
from tests.lab.records import records

QEMU: Final = "/usr/bin/qemu-system-x86_64"
RECORDS: Final = 60
HALT_S: Final = 2
MACHINE: Final = "pc"
_STRIDE: Final = 32 << 20
_PASSES: Final = 2
_BOOT_S: Final = 300
_AT_ONCE: Final = {"max-bandwidth": 1 << 34, "downtime-limit": 60_000}


@dataclass(frozen=True)
class KeptRecords:
    """How many records a guest has kept after a stop, out of RECORDS of each kind."""

    disks: int
    """How many of the records that the first disk had acknowledged are kept."""
    guest: int
    """How many of the records that the guest had in its memory are kept."""

    def __str__(self) -> str:
        return f"{self.disks:>3} {self.guest:>3}"


@dataclass(frozen=True)
class CorpusGuest:
    name: str
    directory: Path
    """The directory of the guest's disks and serial line."""

    @property
    def serial(self) -> Log:
        return Log(self.directory / "serial")

    def make_disks(self) -> None:
        """Make empty disks. Remove the files of an earlier run."""
        for disk in self.disks:
            disk.unlink(missing_ok=True)
            make_disk(disk, "4G")
        (self.directory / "serial").unlink(missing_ok=True)

    def words(self, state: Path, more: Sequence[str] = (), *, machine: str = MACHINE) -> list[str]:
        """Return the command line that continues the guest from the saved state."""
        words = [QEMU, *_machine(self.disks, self.directory / "serial", machine=machine)]
        return [*words, "-incoming", f"exec:cat {_inside(state)}", *more]

    def wait_until_written(self, timeout: float) -> None:
        """Wait until the first disk has acknowledged all records."""
        said = self.serial.wait_for("^GUEST (DONE|ERROR.*)", timeout).group(1)
        assert said == "DONE", f"{self.name}: {said}"

    def kept(self) -> KeptRecords:
        """Count the records on the disks. No process may have the disks open."""
        disks, guest = (len(records(disk)) for disk in self.disks)
        return KeptRecords(disks, guest)

    @property
    def disks(self) -> tuple[Path, Path]:
        return self.directory / "disk.qcow2", self.directory / "late.qcow2"


def saved_state() -> Path:
    """Return the path of the saved state. Save it if it is missing. Raises needs.Missing."""
    image = guest_image()
    key = hashlib.sha256(Path(__file__).read_bytes() + image.initramfs.name.encode()).hexdigest()
    home = CACHE if os.access(CACHE, os.W_OK) else Path(tempfile.gettempdir())
    state = home / f"corpus-{key[:16]}.state"
    with (home / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not state.exists():
            _save(state)
            for old in home.glob("corpus-*.state"):
                if old != state:
                    old.unlink(missing_ok=True)
    return state


def _save(state: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="corpus-", dir=state.parent) as directory:
        guest = CorpusGuest("corpus", Path(directory))
        guest.make_disks()
        # The guest waits as long as its first disk has this mark.
        mark = Path(directory) / "mark"
        mark.write_bytes(b"WAIT".ljust(512, b"\0"))
        qemu_io = needs.program("qemu-io", "qemu-utils")
        run([qemu_io, "-c", f"write -s {mark} 0 512", guest.disks[0]], check=True)
        monitor = Path(directory) / "qmp"
        words = [QEMU, *_machine(guest.disks, Path(directory) / "serial", inside=False)]
        process = spawn([*words, "-qmp", f"unix:{monitor},server=on,wait=off"])
        try:
            guest.serial.wait_for("^GUEST (WAITING|ERROR.*\n)", _BOOT_S)
            assert "GUEST ERROR" not in guest.serial.text(), guest.serial.text()
            with Qmp(monitor) as qmp:
                # Do not stop the guest before it is saved: it would be saved as a stopped guest,
                # and be stopped again when its state is loaded.
                qmp.call("migrate-set-parameters", **_AT_ONCE)
                qmp.call("migrate", uri=f"exec:cat >{directory}/state")
                # The migration has further states, such as "device" while QEMU saves its devices.
                while (status := qmp.call("query-migrate")["status"]) != "completed":
                    assert status not in ("failed", "cancelled"), status
                    time.sleep(0.05)
        finally:
            end(process)
        Path(directory, "state").rename(state)


def machine_for_newer() -> str:
    """Return the machine type of the saved state, under the name that a newer QEMU uses."""
    listed = run([QEMU, "-M", "help"], check=True).stdout
    found = re.search(rf"^{MACHINE} .*\(alias of (\S+)\)", listed, re.MULTILINE)
    assert found is not None, listed
    return found[1]


def _machine(
    disks: Sequence[Path], serial: Path, *, inside: bool = True, machine: str = MACHINE
) -> list[str]:
    image = guest_image()
    kernel, initramfs = image.kernel, image.initramfs
    shown = _inside if inside else str
    job = f"lab.job=cached lab.records={RECORDS} lab.stride={_STRIDE} lab.passes={_PASSES}"
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-M", machine, "-accel", "tcg"]
    words += ["-m", "96", "-no-reboot", "-kernel", shown(kernel), "-initrd", shown(initramfs)]
    command_line = f"console=ttyS0 quiet panic=-1 nokaslr no_timer_check {job} lab.halt={HALT_S}"
    words += ["-append", command_line, "-serial", f"file:{serial}"]
    for number, disk in enumerate(disks):
        words += ["-drive", f"file={disk},if=none,id=d{number},format=qcow2,cache=writeback"]
        words += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return words


def _inside(path: Path) -> str:
    from tests.lab.container import CHECKOUT

    return str(path).replace(str(TOP), CHECKOUT)
