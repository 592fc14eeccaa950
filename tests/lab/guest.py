"""Targets: a guest that runs Linux, a QEMU without a guest, and cheap substitutes.

    boot_guest       a real QEMU that boots a kernel, and then writes, computes or idles
    start_qemu       a real QEMU without a machine (-M none), up in 0.1 s
    fake_qemu        a static busybox with QEMU's name; with `stubborn`, it ignores SIGTERM
    scripted_qemu    a Python script with QEMU's name, for behaviour that no QEMU has

Each returns a running Guest, which is a context manager. At the end of the context, the process is
killed, and its files are removed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.image import busybox, guest_image
from tests.lab.log import Log, wait_for_path
from tests.lab.process import Orphan, end, run, spawn, wait_gone
from tests.lab.scratch import run_directory, scratch

QEMU: Final = "qemu-system-x86_64"


FIRST_THREAD_EXITS: Final = """
import ctypes, platform, threading, time
print("ready", flush=True)
threading.Thread(target=time.sleep, args=(600,)).start()
exit = {"x86_64": 60, "aarch64": 93}[platform.machine()]
ctypes.CDLL(None).syscall(exit, 0)
"""
"""A script for scripted_qemu. Its first thread exits, while another thread continues."""


def own_qemus() -> str:
    """Return globs for `Executables=` that match only the QEMUs and fake_qemus of this process."""
    return f"{run_directory()}/*/{QEMU}"


@functools.cache
def _qemu() -> Path:
    """Return a copy of the host's QEMU, so that own_qemus() excludes the QEMUs of other test runs.

    QEMU looks for firmware and modules relative to its executable: ../share and ../lib. Raises
    needs.Missing.
    """
    installed = needs.program(QEMU, "qemu-system-x86").resolve()
    copy = run_directory() / "bin" / QEMU
    copy.parent.mkdir()
    for name in ("share", "lib"):
        (run_directory() / name).symlink_to(installed.parents[1] / name)
    return Path(shutil.copy(installed, copy))


@functools.cache
def _busybox() -> Path:
    """Return this run's copy of busybox. The executable of every fake_qemu is a hard link to it."""
    return Path(shutil.copy(busybox(), run_directory() / "busybox"))


@dataclass
class Guest:
    """A running target. `stack` removes everything that was made for it."""

    pid: int
    name: str
    uuid: str
    pidfd: int
    """Readable when the process has ended."""
    directory: Path
    """The directory for serial, qmp, pid and disks. It is removed with the guest."""
    executable: Path
    process: subprocess.Popen[bytes] | None = None
    """None if QEMU is not our child, because it has daemonized itself (`daemonize`)."""
    serial: Log | None = None
    qmp: Path | None = None
    pidfile: Path | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    @property
    def start_time(self) -> int:
        """Field 22 of /proc/PID/stat, in clock ticks since boot."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return int(stat[stat.rindex(")") + 2 :].split()[19])

    def wait_for(self, pattern: str, timeout: float = 60) -> str:
        """Wait for a match of the pattern (re) on the serial line; return the matched text.

        Raises AssertionError if the guest ends first, or after `timeout` seconds.
        """
        assert self.serial is not None, f"{self.name} has no serial line"
        return self.serial.wait_for(pattern, timeout, pidfd=self.pidfd)[0]

    def wait_gone(self, timeout: float = 30) -> int | None:
        """Wait for the end. Return the exit code (-N: ended by signal N), None if the process is
        not our child.

        Raises AssertionError after `timeout` seconds.
        """
        assert wait_gone(self.pidfd, timeout), f"{self.name} is still there after {timeout} s"
        return None if self.process is None else self.process.wait()

    @property
    def stderr(self) -> str:
        """QEMU's stderr."""
        path = self.directory / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet."""
        return not wait_gone(self.pidfd, 0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal through the pidfd. Raises ProcessLookupError if the process is gone."""
        signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        self.stack.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_disk(path: Path, size: str = "1G", format: str = "qcow2") -> Path:
    """Make an empty image. `size` in qemu-img's format."""
    run(
        [needs.program("qemu-img", "qemu-utils"), "create", "-q", "-f", format, path, size],
        check=True,
    )
    return path


def boot_guest(
    *,
    name: str = "lab",
    uuid: str | None = None,
    job: str = "idle",
    disk: Path | str | None = None,
    disk_format: str = "qcow2",
    disk_options: str = "cache=writeback",
    records: int = 0,
    stride: int = 4096,
    passes: int = 1,
    memory: int = 96,
    qmp: bool = False,
    pidfile: bool = False,
    daemonize: bool = False,
    append: str = "",
    arguments: Sequence[str] = (),
    uid: int | None = None,
    wait: bool = True,
) -> Guest:
    """Boot Linux in a real QEMU (tcg). With `wait`, return when it has begun its job (2 s).

    job      what the guest does:
             idle    It does nothing.
             busy    It uses one processor.
             writer  It writes `records` records of 4 KiB with O_DIRECT, and prints ACK N after
                     each. initramfs/writer.c explains `stride` (bytes) and `passes`.
             power   It reacts to its power button as `append` says: lab.power=off, reboot, nothing,
                     or work (write for lab.seconds=N, then power off). With lab.busy=1, it also
                     uses one processor all the time.
    disk     a file, or any value of -drive file= (nbd://...); the guest sees it as NVMe. A writer's
             default is a new qcow2 of 1 GiB in the guest's directory (disk.qcow2).
    memory   MiB
    uid      run as that user; needs root

    Raises needs.Missing if set-up has not run, AssertionError if the guest does not boot.
    """
    image = guest_image()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("g"))
        if disk is None and job == "writer":
            disk = make_disk(directory / "disk.qcow2")
        serial = Log(directory / "serial")
        command_line = f"console=ttyS0 quiet panic=-1 nokaslr no_timer_check lab.job={job} {append}"
        if job == "writer":
            command_line += f" lab.records={records} lab.stride={stride} lab.passes={passes}"
        machine = [
            *("-M", "pc", "-accel", "tcg", "-m", str(memory), "-no-reboot"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", command_line, "-serial", f"file:{serial.path}"),
        ]
        if disk is not None:
            where = os.fspath(disk).replace(",", ",,")
            machine += ["-drive", f"file={where},if=none,id=d0,format={disk_format},{disk_options}"]
            machine += ["-device", "nvme,drive=d0,serial=lab"]
        guest = _start(
            stack,
            directory,
            [*machine, *arguments],
            _Names(name, uuid, qmp, pidfile, daemonize),
            uid,
        )
        guest.serial = serial
        if wait:
            try:
                matched = guest.wait_for(r"^GUEST (READY|ERROR).*$")
            except AssertionError as error:
                raise AssertionError(f"{error}\n{guest.stderr}") from None
            assert matched.startswith("GUEST READY"), f"the guest {name!r} says: {matched}"
        guest.stack = stack.pop_all()
        return guest


LARGE: Final = ("-object", "memory-backend-ram,id=m,size=3G,prealloc=on,share=on")
"""Arguments that give a QEMU so much memory that the kernel needs most of a second to free it."""


def start_qemu(
    *,
    name: str = "lab",
    uuid: str | None = None,
    qmp: bool = True,
    pidfile: bool = False,
    daemonize: bool = False,
    arguments: Sequence[str] = (),
    uid: int | None = None,
) -> Guest:
    """Start a real QEMU without a machine.

    With `qmp` (or `daemonize`), return when QEMU's main loop runs, so that QEMU handles SIGTERM.
    Otherwise, return when the program has been started.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("q"))
        names = _Names(name, uuid, qmp, pidfile, daemonize)
        guest = _start(stack, directory, ["-M", "none", *arguments], names, uid)
        if guest.qmp is not None:
            _greet(guest)
        guest.stack = stack.pop_all()
        return guest


def fake_qemu(
    *,
    name: str = "lab",
    uuid: str | None = None,
    stubborn: bool = False,
    arguments: Sequence[str] | None = None,
    uid: int | None = None,
) -> Guest:
    """Start a process that does nothing. Its executable has QEMU's name (see own_qemus).

    Its command line ends in `-name NAME -uuid UUID`, or in `arguments`. `stubborn`: it ignores
    SIGTERM and SIGINT from the start.
    """
    uuid = uuid or str(uuid_module.uuid4())
    if arguments is None:
        arguments = ["-name", name, "-uuid", uuid]
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("f"))
        executable = directory / QEMU
        executable.hardlink_to(_busybox())
        # The process reads forever, because it has the write end of the pipe open itself.
        os.mkfifo(directory / "never")
        never = os.open(directory / "never", os.O_RDWR)
        try:
            process = spawn(
                # busybox takes its command from argv[0]. The words after the script are its $0, $1,
                # ...
                ["sh", "-c", "read nothing", QEMU, *arguments],
                executable=executable,
                stdin=never,
                uid=uid,
                before=_ignore_polite_signals if stubborn else None,
            )
        finally:
            os.close(never)
        stack.callback(end, process)
        guest = Guest(process.pid, name, uuid, os.pidfd_open(process.pid), directory, executable)
        guest.process = process
        stack.callback(os.close, guest.pidfd)
        guest.stack = stack.pop_all()
        return guest


def scripted_qemu(script: str, *, name: str = "lab", uid: int | None = None) -> Guest:
    """Run a Python script. The executable of its process has QEMU's name (see own_qemus).

    Returns when the script has printed and flushed "ready". Its further output is in `serial`.
    """
    uuid = str(uuid_module.uuid4())
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("p"))
        executable = Path(shutil.copy(Path(sys.executable).resolve(), directory / QEMU))
        (directory / "said").touch()
        with (directory / "said").open("ab") as said:
            process = spawn(
                [QEMU, "-S", "-c", script, "-name", name, "-uuid", uuid],
                executable=executable,
                stdout=said,
                env={"PYTHONHOME": sys.base_prefix},
                uid=uid,
            )
        stack.callback(end, process)
        guest = Guest(process.pid, name, uuid, os.pidfd_open(process.pid), directory, executable)
        stack.callback(os.close, guest.pidfd)
        guest.process, guest.serial = process, Log(directory / "said")
        guest.wait_for("^ready$")
        guest.stack = stack.pop_all()
        return guest


def _ignore_polite_signals() -> None:
    # Ignored signals stay ignored after exec.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a QEMU, and the ways to reach it."""

    name: str
    uuid: str | None
    qmp: bool
    pidfile: bool
    daemonize: bool


def _start(
    stack: contextlib.ExitStack,
    directory: Path,
    more: Sequence[str],
    names: _Names,
    uid: int | None,
) -> Guest:
    """Start QEMU, which is ended by `stack`."""
    executable = _qemu()
    uuid = names.uuid or str(uuid_module.uuid4())
    qmp = directory / "qmp" if names.qmp else None
    pidfile = directory / "pid" if names.pidfile or names.daemonize else None
    argv: list[str] = [str(executable), "-name", f"guest={names.name.replace(',', ',,')}"]
    argv += ["-uuid", uuid, "-nodefaults", "-no-user-config", "-display", "none"]
    if qmp:
        argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    if pidfile:
        argv += ["-pidfile", str(pidfile)]
    if names.daemonize:
        argv += ["-daemonize"]
    if uid is not None:
        os.chown(directory, uid, uid)
        for path in directory.iterdir():
            os.chown(path, uid, uid)
    with (directory / "stderr").open("wb") as stderr:
        process = spawn([*argv, *more], stdout=stderr, stderr=stderr, uid=uid)
    stack.callback(end, process)
    pid = process.pid
    if names.daemonize:
        # The first process exits when the guest runs or has failed to start.
        assert process.wait(30) == 0, (directory / "stderr").read_text()
        assert pidfile is not None
        orphan = Orphan(int(pidfile.read_text()))
        stack.callback(orphan.kill)
        pid = orphan.pid
    guest = Guest(pid, names.name, uuid, os.pidfd_open(pid), directory, executable)
    stack.callback(os.close, guest.pidfd)
    guest.process = None if names.daemonize else process
    guest.qmp, guest.pidfile = qmp, pidfile
    return guest


def _greet(guest: Guest) -> None:
    """Make QEMU's main loop answer one QMP command."""
    assert guest.qmp is not None
    wait_for_path(guest.qmp, 90, pidfd=guest.pidfd)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(90)
        while True:
            try:
                connection.connect(str(guest.qmp))
                break
            except ConnectionRefusedError:  # QEMU has bound the socket, but does not listen yet.
                assert guest.alive, guest.stderr
        connection.sendall(b'{"execute": "qmp_capabilities"}')
        answer = b""
        while b'"return"' not in answer:
            received = connection.recv(4096)
            assert received, f"QEMU closed its QMP socket: {answer!r}\n{guest.stderr}"
            answer += received
