"""A guest that runs Debian: systemd, logind and the guest agent.

`boot_debian` continues the guest from a state that was saved after a boot. This takes a second
under tcg, while a boot takes a minute. `python -m tests.lab.debian` saves this state, if there is
none, from the disk that packaging/setup makes (step debian).

The guest writes to its disks only on command, so the data that can be lost is the same in every
run. The files that are counted afterwards are on its second disk, mounted on /data.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.guest import QEMU, Guest, start_qemu
from tests.lab.image import CACHE
from tests.lab.log import Log, WaitTimeout
from tests.lab.process import run
from tests.lab.qmp import Qmp
from tests.lab.scratch import scratch

BOOT_S: Final = 400
"""Timeout for a boot on a busy machine. On an idle machine, a boot takes 30 s."""
FILES: Final = 8
_DATA_SIZE: Final = "32M"
# fmt: off
_MACHINE: Final = (
    "-M", "pc", "-accel", "tcg", "-m", "256", "-no-reboot",
    "-device", "virtio-blk-pci,drive=root", "-device", "virtio-blk-pci,drive=data",
    "-device", "virtio-serial-pci", "-device",
    "virtserialport,chardev=agent,id=agent-port,name=org.qemu.guest_agent.0",
    "-device", "isa-serial,chardev=console,index=0", "-device", "isa-serial,chardev=shell,index=1",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Disks:
    root: Path
    data: Path


class Shell:
    """Root's shell in the guest, on its second serial line."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._numbers = itertools.count(1)

    def run(self, command: str, timeout: float = BOOT_S) -> str:
        """Run a command and return its output. Raises AssertionError if it fails, or takes longer
        than `timeout` seconds."""
        number = next(self._numbers)
        begin, end = f"LAB-{number}-BEGIN", f"LAB-{number}-END"
        # The first line break ends any earlier input on the serial line.
        line = f"\necho {begin}; ( {command} ) </dev/null; echo {end}=$?\n"
        self._socket.settimeout(timeout)
        self._socket.sendall(line.encode())
        deadline = time.monotonic() + timeout
        text = ""
        while (found := re.search(rf"{end}=(\d+)\n", text)) is None:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                received = self._socket.recv(4096)
            except TimeoutError:
                raise WaitTimeout(f"no answer to {command!r} in {timeout} s: {text!r}") from None
            assert received, f"the guest has ended: {text!r}"
            text += received.decode(errors="replace").replace("\r", "")
        printed = text[: found.start()].rpartition(f"{begin}\n")[2]
        assert found[1] == "0", f"{command!r} failed: {printed}"
        return printed

    def wait_until_there(self) -> None:
        """Wait until the shell answers. Commands sent before may be lost."""
        deadline = time.monotonic() + BOOT_S
        while True:
            try:
                self.run("true", 3)
                return
            except (WaitTimeout, TimeoutError):
                assert time.monotonic() < deadline, "the guest's shell does not come"

    def tell(self, command: str) -> None:
        """Start a command, without waiting for its end."""
        self._socket.sendall(f"\n{command}\n".encode())

    def close(self) -> None:
        self._socket.close()


@dataclass
class Debian:
    """A running Debian guest, with its disk, its shell and its agent."""

    guest: Guest
    shell: Shell
    data: Path
    """Its second disk, a qcow2."""
    agent: Path
    """The agent's socket on the host."""

    def write_files(self) -> None:
        """Write FILES files in the guest. They stay in its page cache."""
        write_files(self.shell)

    def kept(self) -> tuple[int, bool]:
        """Return how many of the files are complete, and whether the file system is clean. Call
        this after the guest has exited."""
        return kept_files(self.data)


def write_files(shell: Shell) -> None:
    """Write FILES files in a guest. They stay in its page cache."""
    shell.run(
        f"for i in $(seq {FILES}); do"
        " head -c 65536 /dev/zero | tr '\\0' $i >/data/file$i || exit 1; done"
    )


def kept_files(data: Path) -> tuple[int, bool]:
    """Return how many of the files on a disk are complete, and whether its file system is clean."""
    with scratch("k") as directory:
        image = directory / "data"
        _qemu_img("convert", "-O", "raw", data, image)
        debugfs, dumpe2fs = (needs.program(n, "e2fsprogs") for n in ("debugfs", "dumpe2fs"))
        features = run([dumpe2fs, "-h", image], check=True).stdout
        whole = 0
        for number in range(1, FILES + 1):
            dumped = run([debugfs, "-R", f"cat /file{number}", image]).stdout
            whole += dumped == str(number) * 65536
    return whole, "needs_recovery" not in features


@contextlib.contextmanager
def boot_debian(
    *,
    state: bool = True,
    qmp: bool = True,
    arguments: Sequence[str] = (),
    append: str = "",
    wait: bool = True,
) -> Iterator[Debian]:
    """Run a Debian guest. Without `state`, the guest boots, with `append` on its kernel command
    line.

    "{directory}" in `arguments` is replaced by the guest's directory. With `wait`, the guest runs
    at entry, and after a boot, all its units have started. Raises needs.Missing if its disk is
    missing.
    """
    with scratch("d") as directory:
        disks, more = _continued(directory) if state else _fresh(directory)
        more += [word.replace("{directory}", str(directory)) for word in arguments]
        with _start(directory, disks, more, append=append, qmp=qmp) as debian:
            if wait and state:
                debian.shell.wait_until_there()
            elif wait:
                _wait_until_up(debian.shell)
            yield debian


@contextlib.contextmanager
def _start(
    directory: Path, disks: _Disks, arguments: Sequence[str], *, append: str = "", qmp: bool = True
) -> Iterator[Debian]:
    machine = [*_machine(directory, disks, append), *arguments]
    with start_qemu(name="debian", qmp=qmp, arguments=machine) as guest:
        guest.serial = Log(directory / "console")
        shell = _connect_shell(directory / "shell", guest)
        try:
            yield Debian(guest, shell, disks.data, directory / "agent")
        finally:
            shell.close()


def continued(directory: Path) -> list[str]:
    """Return the arguments of a QEMU that continues the saved guest.

    The guest's disks `root.qcow2` and `data.qcow2` and its sockets `agent` and `shell` are in
    `directory`.
    """
    disks, more = _continued(directory)
    return [*_machine(directory, disks), *more]


def _continued(directory: Path) -> tuple[_Disks, list[str]]:
    saved = saved_state()
    disks = _Disks(directory / "root.qcow2", directory / "data.qcow2")
    _overlay(saved / "root.qcow2", disks.root)
    _overlay(saved / "data.qcow2", disks.data)
    return disks, ["-incoming", f"exec:cat {saved}/state"]


def _fresh(directory: Path) -> tuple[_Disks, list[str]]:
    saved = saved_state()
    disks = _Disks(directory / "root.qcow2", directory / "data.qcow2")
    _overlay(saved / "empty.qcow2", disks.root)
    _overlay(saved / "data.qcow2", disks.data)
    return disks, []


def _machine(directory: Path, disks: _Disks, append: str = "") -> list[str]:
    line = f"root=/dev/vda rw console=ttyS0 quiet {append}"
    machine = [*_MACHINE, "-kernel", str(_made() / "vmlinuz"), "-initrd"]
    machine += [str(_made() / "initrd.img"), "-append", line]
    machine += ["-chardev", f"file,id=console,path={directory}/console"]
    for name in ("agent", "shell"):
        machine += ["-chardev", f"socket,id={name},path={directory}/{name},server=on,wait=off"]
    for name, path in (("root", disks.root), ("data", disks.data)):
        machine += ["-drive", f"file={path},if=none,id={name},format=qcow2"]
    return machine


def _connect_shell(path: Path, guest: Guest) -> Shell:
    deadline = time.monotonic() + 60
    while True:
        try:
            return Shell(path)
        except (FileNotFoundError, ConnectionRefusedError):
            assert guest.alive and time.monotonic() < deadline, guest.stderr
            time.sleep(0.02)


def _wait_until_up(shell: Shell) -> None:
    shell.wait_until_there()
    shell.run("systemctl is-system-running --wait || systemctl list-units --failed | grep .")
    shell.run("systemctl is-active qemu-guest-agent")
    # On a busy machine, systemd may stop waiting for the disk before the kernel has found it.
    shell.run("mountpoint -q /data || mount /data")


def saved_state() -> Path:
    """Return the directory of the saved guest. Save the guest again first if the saved one belongs
    to another version of QEMU or of the sources.

    Several releases of Debian can use the same directory at once: each has a saved guest of its
    own. Raises needs.Missing if the guest's disk is missing.
    """
    qemu = needs.program(QEMU, "qemu-system-x86")
    made = _made()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(run([qemu, "--version"], check=True).stdout.encode())
    digest.update(repr((made, (made / "root.img").stat().st_mtime_ns)).encode())
    system = platform.freedesktop_os_release()
    release = f"booted-{system['ID']}-{system.get('VERSION_CODENAME', '')}"
    place = made / f"{release}-{digest.hexdigest()[:16]}"
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            for old in made.glob(f"{release}-*"):
                shutil.rmtree(old)
            _save_state(place)
    return place


def _save_state(place: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix="boot-", dir=place.parent))
    try:
        disks = _Disks(work / "root.qcow2", work / "data.qcow2")
        _overlay(place.parent / "root.img", work / "empty.qcow2", "raw")
        _overlay(place.parent / "root.img", disks.root, "raw")
        raw = work / "data.img"
        run([needs.program("mkfs.ext4", "e2fsprogs"), "-q", raw, _DATA_SIZE], check=True)
        _qemu_img("convert", "-O", "qcow2", raw, disks.data)
        raw.unlink()
        with scratch("b") as sockets, _start(sockets, disks, ()) as debian:
            _wait_until_up(debian.shell)
            # After the boot, the guest still works for a few seconds.
            debian.shell.run("sync; sleep 5; sync")
            with Qmp(debian.guest) as qmp:
                # Do not stop the guest before it is saved: it would be saved as a stopped guest,
                # and be stopped again when its state is loaded.
                limits = {"max-bandwidth": 1 << 40, "downtime-limit": 60_000}
                qmp.call("migrate-set-parameters", **limits)
                qmp.call("migrate", uri=f"exec:cat >{work}/state")
                while (status := qmp.call("query-migrate")["status"]) != "completed":
                    assert status != "failed", "the guest's state cannot be saved"
                    time.sleep(0.1)
                qmp.call("quit")
            debian.guest.wait_gone(60)
        for path in work.iterdir():
            path.chmod(0o444)
        work.chmod(0o755)
        work.rename(place)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _made() -> Path:
    made = CACHE / "debian"
    if not (made / "root.img").exists():
        raise needs.Missing("there is no Debian guest in .lab/debian: run `make setup` as root")
    if not os.access(made, os.W_OK):
        raise needs.Missing("the Debian guest is another user's")
    return made


def _overlay(backing: Path, path: Path, format: str = "qcow2") -> None:
    """Make a qcow2 image at `path`, with `backing` as its backing file."""
    _qemu_img("create", "-q", "-f", "qcow2", "-b", backing.resolve(), "-F", format, path)


def _qemu_img(*arguments: str | Path) -> None:
    run([needs.program("qemu-img", "qemu-utils"), *arguments], check=True)


if __name__ == "__main__":
    if not list(CACHE.glob("debian/booted-*")):
        print("setup: booting it once (half a minute on an idle machine)", file=sys.stderr)
    saved_state()
