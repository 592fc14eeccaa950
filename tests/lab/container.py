"""A throwaway system with its own systemd, journald and D-Bus, up in about two seconds.

It is this machine's own root file system with everything written to memory, so the programs are
those that are installed here; what this machine has enabled or configured for systemd is hidden.
It has a network, process ids and a bus of its own. The checkout is at /opt/qkilld, read-only.

/tmp is a fresh tmpfs inside: put what is needed elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
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
"""Where the checkout is inside."""
PYTHON: Final = f"{CHECKOUT}/.venv/bin/python"

_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)

_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONPATH": CHECKOUT,
    "PYTHONDONTWRITEBYTECODE": "1",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
}

_HIDDEN: Final = ("etc/systemd", "etc/qkilld", "usr/lib/qkilld")
"""Directories of this machine that do not show inside."""

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
    # Of hardware and kernel, which are this machine's.
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
    # Of a first boot, an update or long running.
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
    """A booted one."""

    def __init__(self, name: str, leader: int, console: Log) -> None:
        self.name = name
        """Of the machine, and of its control group on this one."""
        self.leader = leader
        """The pid of its systemd, as this machine counts."""
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
        """Runs a command inside, as root or as that user, with an environment of its own.

        With `check` a failure is an AssertionError that tells what the command said.
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
        """Starts a command inside, with a pipe for its output; afterwards it is gone."""
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
            # The command is nsenter's child. Killed before nsenter it is reaped by it; left to us
            # as a zombie it would keep its pid namespace, and so the container, from ending.
            if process.poll() is None:
                for pid in children(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            end(process)

    def python(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The checkout's python, e.g. `python("-m", "qkilld.ctl", "list")`; options as run()."""
        return self.run(PYTHON, *arguments, **options)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file inside. Symbolic links on the way are those inside."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, f"{mode:o}", input=text)

    def copy_in(self, source: Path, path: str, mode: int = 0o644) -> None:
        """A text file of this machine, at `path` inside."""
        self.write(path, source.read_text(), mode)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """What is started herein is outside of it, and in its network: it outlives a shutdown."""
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
        """A property of a unit, as `systemctl show` has it: MainPID, ActiveState, Result, ..."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Every entry with those matches (FIELD=VALUE, or options of journalctl), oldest first."""
        self.run("journalctl", "--sync")
        entries = self.run("journalctl", "--output=json", "--all", "--no-pager", "-q", *matches)
        return [json.loads(line) for line in entries.stdout.splitlines()]

    def wait_journal(self, *matches: str, timeout: float = 30) -> dict[str, Any]:
        """The oldest entry with those matches, as soon as there is one.

        AssertionError if the time (seconds) runs out before.
        """
        deadline = time.monotonic() + timeout
        follow = ("journalctl", "--follow", "--lines=all", "--output=json", "--all", "-q")
        with self.spawn(*follow, *matches) as journalctl:
            assert journalctl.stdout is not None
            line = b""
            while not line.endswith(b"\n"):
                left = max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([journalctl.stdout], [], [], left)
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


@contextlib.contextmanager
def boot() -> Iterator[Container]:
    """Boots one, and returns when its systemd says that it is up.

    Raises needs.Missing, with the reason, where that cannot be had. Nothing is left afterwards:
    mounts and processes go with this process, however it ends.
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
        # Mounted upon in a namespace of the container's own, so that two runs may share it. Not in
        # the scratch directory: /tmp may be a mount that the container has to do without.
        mountpoint = CACHE / "container"
        mountpoint.mkdir(parents=True, exist_ok=True)
        console = Log(directory / "console")
        notify = stack.enter_context(NotifySocket(directory))
        escaped = str(TOP).replace("\\", "\\\\").replace(":", "\\:")

        def join_cgroups() -> None:
            for cgroup in cgroups:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        upper = directory / "upper"
        environment = {"NOTIFY_SOCKET": str(notify.path), "SYSTEMD_LOG_TARGET": "console"}
        with console.path.open("wb") as output:
            process = spawn(
                [
                    *(sys.executable, "-m", "tests.lab.nspawn", mountpoint, upper, "--"),
                    *(nspawn, "--directory={root}", "--boot", f"--machine={name}"),
                    *("--register=no", "--keep-unit", "--notify-ready=yes", "--private-network"),
                    *("--capability=all", "--link-journal=no", "--resolv-conf=off"),
                    *("--timezone=off", "--console=pipe"),
                    f"--bind-ro={escaped}:{CHECKOUT}:norbind",
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
        # Its systemd goes on sending its status, and would stand still on a socket nobody reads.
        notify.close()
        yield Container(name, leader, console)


def _set_network(namespace: int) -> None:
    """Of this thread."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def install(container: Container, *variables: str) -> None:
    """`make install` in it, with these variables of make (`PREFIX=/usr/local`), and what an
    administrator does after it. The programs run by the checkout's python."""
    make = ("make", "-C", CHECKOUT, "install")
    container.run(*make, f"PYTHON={PYTHON}", *variables)
    container.run("systemctl", "daemon-reload")
    container.run("journalctl", "--update-catalog")
    container.run("systemctl", "reload", "dbus.service")


def _power_off(leader_pidfd: int, nspawn_pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(leader_pidfd, signal.SIGKILL)
    # Everything inside has gone with its first process when nspawn says so by ending.
    wait_gone(nspawn_pidfd, 30)


def _write_upper(upper: Path) -> None:
    """The tree that lies above this machine's root file system."""
    for hidden in _HIDDEN:
        (upper / hidden).mkdir(parents=True)
        (upper / hidden / ".hide").touch()
    for name, text in _FILES.items():
        (upper / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / name).write_text(text)
    for unit in _MASKED:
        (upper / "etc/systemd/system" / unit).symlink_to("/dev/null")
