"""A throwaway system with its own systemd, journald and D-Bus, up in about two seconds.

The container uses this host's root file system, so it has the programs that are installed here. All
writes go to memory. The host's systemd configuration and enabled units are hidden. The container
has its own network, PID namespace and bus. The checkout is at /opt/qkilld, read-only.

Inside, /tmp is an empty tmpfs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.lab import needs
from tests.lab.cgroup import own_cgroup
from tests.lab.image import CACHE
from tests.lab.log import Log
from tests.lab.notify import NotifySocket
from tests.lab.process import TOP, Stream, children, communicate, end, spawn, wait_gone
from tests.lab.scratch import scratch

CHECKOUT: Final = "/opt/qkilld"
"""The path of the checkout in the container."""
PYTHON: Final = f"{CHECKOUT}/.venv/bin/python"
BUSES: Final = ("dbus-daemon", "dbus-broker")
_message_bus = BUSES[0]

_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)

_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    # Without this, newer releases of script(1) run the shell of the user, which may be nologin.
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONPATH": CHECKOUT,
    "PYTHONDONTWRITEBYTECODE": "1",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
}

_HIDDEN: Final = ("etc/systemd", "etc/qkilld", "usr/lib/qkilld")
"""Directories of the host that are hidden in the container."""

_FILES: Final = {
    "etc/machine-id": "",
    "etc/fstab": "",
    "etc/crypttab": "",
    "etc/systemd/journald.conf": "[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n",
    "etc/systemd/system/default.target": (
        "[Unit]\nDescription=What the tests need\nRequires=basic.target\nAfter=basic.target\n"
        "Wants=dbus.service\nAllowIsolate=yes\n"
    ),
}

_MASKED: Final = (
    # Units for hardware and the kernel, which belong to the host.
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "kmod-static-nodes.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-hwdb-update.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
    # Units that do work at a first boot, after an update or after a long uptime.
    "ldconfig.service",
    "systemd-firstboot.service",
    "systemd-journal-catalog-update.service",
    "systemd-machine-id-commit.service",
    "systemd-sysusers.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-tmpfiles-clean.timer",
)


class Container:
    """A running container."""

    def __init__(self, name: str, leader: int, console: Log) -> None:
        self.name = name
        """The name of the machine and of its control group on the host."""
        self.leader = leader
        """The host's process id of the container's systemd."""
        self.console = console

    def run(
        self,
        *command: str,
        input: str | None = None,
        check: bool = True,
        timeout: float = 60,
        uid: int | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the container as root, or as `uid`, with a fresh environment.

        With `check`, a failure raises AssertionError with the command's output.
        """
        with self.spawn(
            *command,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            uid=uid,
            env=env,
        ) as process:
            return communicate(process, input=input, timeout=timeout, check=check)

    @contextlib.contextmanager
    def spawn(
        self,
        *command: str,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
        stderr: Stream = subprocess.STDOUT,
        uid: int | None = None,
        env: dict[str, str] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Within the context, run a command in the container, with a pipe for its output."""
        process = spawn(
            self._enter(command, uid),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=_ENVIRONMENT | (env or {}),
        )
        try:
            yield process
        finally:
            # Kill the command before its parent nsenter, so that nsenter reaps the command. If it
            # became a zombie of ours, the container's PID namespace could not end.
            if process.poll() is None:
                for pid in children(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            end(process)

    def python(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the checkout's python, e.g. `python("-m", "qkilld.ctl", "list")`. Options are those
        of run()."""
        return self.run(PYTHON, *arguments, **options)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the container. Symbolic links are resolved there, too."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, f"{mode:o}", input=text)

    def copy_in(self, source: Path, path: str, mode: int = 0o644) -> None:
        """Copy a text file of the host to `path` in the container."""
        self.write(path, source.read_text(), mode)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Within the context, programs started on the host are in the container's network. They
        outlive the container's shutdown."""
        outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(f"/proc/{self.leader}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_network(inside)
            yield
        finally:
            _set_network(outside)
            os.close(inside)
            os.close(outside)

    def property(self, unit: str, name: str) -> str:
        """Return a property of a unit, as `systemctl show` prints it: MainPID, ActiveState, Result,
        ..."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def outside(self, pid: int) -> int:
        """Return the host's pid of a process in the container."""
        inside = Path(f"/proc/{self.leader}/ns/pid").readlink()
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (directory / "ns/pid").readlink() == inside:
                    status = (directory / "status").read_text()
                    outer, *_, inner = status.partition("NSpid:")[2].splitlines()[0].split()
                    if int(inner) == pid:
                        return int(outer)
        raise AssertionError(f"no process {pid} in {self.name}")

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Return all entries of the container's journal with these matches (FIELD=VALUE, or options
        of journalctl), oldest first."""
        self.run("journalctl", "--sync")
        entries = self.run("journalctl", "--output=json", "--all", "--no-pager", "-q", *matches)
        return [json.loads(line) for line in entries.stdout.splitlines()]

    def wait_journal(self, *matches: str, timeout: float = 30) -> dict[str, Any]:
        """Wait for an entry of the container's journal with these matches; return the oldest.

        Raises AssertionError after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        follow = ("journalctl", "--follow", "--lines=all", "--output=json", "--all", "-q")
        with self.spawn(*follow, *matches) as journalctl:
            assert journalctl.stdout is not None
            line = b""
            while not line.endswith(b"\n"):
                remaining = max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([journalctl.stdout], [], [], remaining)
                assert ready, f"no journal entry with {matches} came within {timeout} s"
                more = os.read(journalctl.stdout.fileno(), 1)
                assert more, f"journalctl ended: {line.decode(errors='replace')}"
                line += more
        entry: dict[str, Any] = json.loads(line)
        return entry

    def _enter(self, command: tuple[str, ...], uid: int | None) -> list[str | Path]:
        nsenter = needs.program("nsenter", "util-linux")
        user = [] if uid is None else [f"--setuid={uid}", f"--setgid={uid}"]
        inside = ["setpriv", "--pdeathsig=KILL", "--", *command]
        where = [f"--target={self.leader}", "--all", "--root", "--wd"]
        return [nsenter, *where, *user, "--", *inside]


def use(message_bus: str) -> None:
    """Make every container use this message bus (one of BUSES) from now on."""
    global _message_bus
    _message_bus = message_bus


@contextlib.contextmanager
def boot(
    lower: Path = Path("/"), *, unified: bool | None = None, message_bus: str = ""
) -> Iterator[Container]:
    """Within the context, run a container. It has booted at entry.

    `lower`: the root file system to use instead of the host's. `unified`: True for cgroup v2 only,
    False for no v2, None for the same as the host (systemd-nspawn's default). `message_bus`: one of
    BUSES, for the system and for users; "" for the one that use() has set.

    Raises needs.Missing with the reason if no container can be booted. All mounts and processes end
    at the latest with this process, even if it is killed.
    """
    needs.root("a container")
    nspawn = needs.program("systemd-nspawn", "systemd-container")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("c"))
        name = f"qkilld-lab-{secrets.token_hex(4)}"
        try:
            cgroups = stack.enter_context(own_cgroup(name))
        except OSError as error:
            raise needs.Missing(f"no control group can be made for a container: {error}") from None
        _write_upper(directory / "upper")
        if (message_bus or _message_bus) == "dbus-broker":
            _put_broker(lower, directory / "upper")
        # Several runs can share this mount point, because each container has its own mount
        # namespace. The mount point is not in the scratch directory, because /tmp may be a mount
        # that the container does not have.
        mountpoint = CACHE / "container"
        mountpoint.mkdir(parents=True, exist_ok=True)
        console = Log(directory / "console")
        notify = stack.enter_context(NotifySocket(directory))
        escaped = str(TOP).replace("\\", "\\\\").replace(":", "\\:")
        # Mounts in the checkout (tests/distros/chroot) are bound one by one. If all were bound, the
        # container would contain itself.
        mounts = [
            f"--bind-ro={escaped}/{name}:{place}/{name}:norbind"
            for name in (".venv", ".lab/guest", ".lab/debian")
            for place in (CHECKOUT, escaped)
            if (TOP / name).is_mount()
        ]

        def join_cgroups() -> None:
            for cgroup in cgroups:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        upper = directory / "upper"
        environment = {"NOTIFY_SOCKET": str(notify.path), "SYSTEMD_LOG_TARGET": "console"}
        if unified is not None:
            environment["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = str(int(unified))
        with console.path.open("wb") as output:
            process = spawn(
                [
                    *(sys.executable, "-m", "tests.lab.nspawn", mountpoint, lower, upper, "--"),
                    *(nspawn, "--directory={root}", "--boot", f"--machine={name}"),
                    *("--register=no", "--keep-unit", "--notify-ready=yes", "--private-network"),
                    *("--capability=all", "--link-journal=no", "--resolv-conf=off"),
                    *("--timezone=off", "--console=pipe"),
                    # nspawn forbids pidfd_getfd(2), but real machines do not.
                    "--system-call-filter=pidfd_getfd",
                    f"--bind-ro={escaped}:{CHECKOUT}:norbind",
                    *mounts,
                ],
                stdout=output,
                stderr=output,
                cwd=TOP,
                env=os.environ | environment,
                before=join_cgroups,
            )
        stack.callback(end, process)
        nspawn_pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, nspawn_pidfd)
        try:
            leader = int(notify.wait_for("X_NSPAWN_LEADER_PID", 30, pidfd=nspawn_pidfd))
            leader_pidfd = os.pidfd_open(leader)
            stack.callback(os.close, leader_pidfd)
            stack.callback(_power_off, leader_pidfd, nspawn_pidfd)
            notify.wait_for("READY", 60, pidfd=nspawn_pidfd)
        except AssertionError as error:
            said = console.text()
            raise needs.Missing(
                f"systemd does not boot in a container here: {error}:\n{said}"
            ) from None
        # Close the socket. The container's systemd would block on a socket that nobody reads.
        notify.close()
        yield Container(name, leader, console)


def _set_network(namespace: int) -> None:
    """Set the network namespace of this thread."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def install(container: Container, *variables: str) -> None:
    """In the container, run `make install` with these variables (`PREFIX=/usr/local`), and the
    commands that an administrator runs afterwards. The installed programs use the checkout's
    python."""
    make = ("make", "-C", CHECKOUT, "install")
    container.run(*make, f"PYTHON={PYTHON}", *variables)
    container.run("systemctl", "daemon-reload")
    container.run("journalctl", "--update-catalog")
    container.run("systemctl", "reload", "dbus.service")


def _power_off(leader_pidfd: int, nspawn_pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(leader_pidfd, signal.SIGKILL)
    # When nspawn has ended, all processes in the container have ended, too.
    wait_gone(nspawn_pidfd, 30)


def _put_broker(lower: Path, upper: Path) -> None:
    """Make dbus-broker the message bus: the installed one or, if there is none, the one that
    packaging/setup has unpacked. Raises needs.Missing."""
    files = ("bin/dbus-broker", "bin/dbus-broker-launch")
    if not (lower / "usr" / files[0]).exists():
        unpacked = CACHE / "guest"
        if not (unpacked / "usr" / files[0]).exists():
            raise needs.Missing("there is no dbus-broker in .lab/guest: run `make setup`")
        for name in files:
            (upper / "usr" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(unpacked / "usr" / name, upper / "usr" / name)
        # Debian 12 has one of the two units below /lib.
        for source in unpacked.glob("**/systemd/*/dbus-broker.service"):
            target = upper / "usr/lib/systemd" / source.parent.name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for manager in ("system", "user"):
        link = upper / "etc/systemd" / manager / "dbus.service"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"/usr/lib/systemd/{manager}/dbus-broker.service")


def _write_upper(upper: Path) -> None:
    """Make the tree that covers the host's root file system."""
    for hidden in _HIDDEN:
        (upper / hidden).mkdir(parents=True)
        (upper / hidden / ".hide").touch()
    for name, text in _FILES.items():
        (upper / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / name).write_text(text)
    for unit in _MASKED:
        (upper / "etc/systemd/system" / unit).symlink_to("/dev/null")
