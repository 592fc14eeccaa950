"""Columns whose guests run in a throwaway system: plain systemd, and libvirt.

The storage is in this process's scratch directory on the host. In the throwaway system, it is
visible under the same path. TCP servers are started in the system's network.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.bench import peer
from tests.lab import container, needs
from tests.lab.image import guest_image
from tests.lab.process import TOP, wait_gone
from tests.lab.scratch import run_directory
from tests.safety import domain
from tests.safety.machine import Machine, Target
from tests.safety.outcome import Outcome, Policy, Stopper

STOP_TIMEOUT_S: Final = 10
_TIMEOUT_S: Final = 120
_UNIT: Final = "lab-guest.service"

_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_libc: Final = ctypes.CDLL(None, use_errno=True)

_ATTACH: Final = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs(sys.argv[2], exist_ok=True)
if libc.syscall({_SYS_MOVE_MOUNT}, int(sys.argv[1]), b"", {_AT_FDCWD}, os.fsencode(sys.argv[2]),
                {_MOVE_MOUNT_F_EMPTY_PATH}):
    raise OSError(ctypes.get_errno(), "move_mount", sys.argv[2])
"""


class ContainerPolicy:
    """The common part of both columns."""

    def __init__(self, system: container.Container) -> None:
        self._system = system

    def network(self) -> contextlib.AbstractContextManager[None]:
        return self._system.network()

    def show_storage(self) -> None:
        """Make the scratch directory and the mounts below it visible in the system."""
        path = os.fsencode(run_directory())
        tree = _libc.syscall(
            _SYS_OPEN_TREE,
            _AT_FDCWD,
            path,
            _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE,
        )
        if tree < 0:
            raise OSError(ctypes.get_errno(), "open_tree", str(run_directory()))
        try:
            nsenter = needs.program("nsenter", "util-linux")
            subprocess.run(
                [
                    *(nsenter, f"--target={self._system.leader}", "--mount", "--root", "--wd"),
                    *("--", "/usr/bin/python3", "-IS", "-c", _ATTACH),
                    *(str(tree), str(run_directory())),
                ],
                check=True,
                pass_fds=(tree,),
            )
        finally:
            os.close(tree)


class Systemd(ContainerPolicy):
    """The guest runs in a service that sets only TimeoutStopSec=."""

    @contextlib.contextmanager
    def launch(self, machine: Machine) -> Iterator[Target]:
        self.show_storage()
        script = machine.directory / "run"
        script.write_text(f"exec {_inside(shlex.join(machine.argv()))}\n")
        self._system.write(
            f"/etc/systemd/system/{_UNIT}",
            f"[Service]\nExecStart=/bin/sh {script}\nTimeoutStopSec={STOP_TIMEOUT_S}\n",
        )
        self._system.run("systemctl", "start", _UNIT)
        with _held(Target.find(machine)) as target:
            yield target

    def stop(self, target: Target) -> Outcome:
        start = time.monotonic()
        self._system.run("systemctl", "stop", _UNIT, timeout=_TIMEOUT_S)
        seconds = time.monotonic() - start
        if target.alive:
            return Outcome("survived", seconds, self._property("Result"))
        killed = self._property("ExecMainStatus") == str(int(signal.SIGKILL))
        return Outcome("killed" if killed else "exited", seconds, self._property("Result"))

    def _property(self, name: str) -> str:
        return self._system.property(_UNIT, name)


class Libvirt(ContainerPolicy):
    """libvirtd starts the guest, and virsh destroy stops it."""

    def __init__(self, system: container.Container, options: tuple[str, ...]) -> None:
        super().__init__(system)
        self._options = options
        self._domain: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def launch(self, machine: Machine) -> Iterator[Target]:
        self.show_storage()
        description = machine.directory / "domain.xml"
        description.write_text(_inside(domain.description(machine)))
        program = (container.PYTHON, "-m", "tests.safety.domain", str(description), machine.name)
        with (
            (machine.directory / "stderr").open("wb") as stderr,
            self._system.spawn(*program, stdin=subprocess.PIPE, stderr=stderr) as process,
        ):
            self._domain = process
            self._answer(machine)
            with _held(Target.find(machine)) as target:
                yield target

    def stop(self, target: Target) -> Outcome:
        assert self._domain is not None and self._domain.stdin is not None
        self._domain.stdin.write(json.dumps(self._options).encode() + b"\n")
        self._domain.stdin.flush()
        said = self._answer(target.machine)
        if target.alive:
            return Outcome("survived", said["seconds"], said["said"])
        killed = said["status"] == -signal.SIGKILL
        return Outcome("killed" if killed else "exited", said["seconds"], said["said"])

    def _answer(self, machine: Machine) -> dict[str, Any]:
        assert self._domain is not None and self._domain.stdout is not None
        line = self._domain.stdout.readline()
        assert line, f"libvirt: {machine.said()}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _inside(text: str) -> str:
    """Replace the checkout's paths on the host by its paths in the system."""
    return text.replace(str(TOP), container.CHECKOUT)


@contextlib.contextmanager
def _held(target: Target) -> Iterator[Target]:
    try:
        yield target
    finally:
        with contextlib.suppress(ProcessLookupError):
            target.signal(signal.SIGKILL)
        wait_gone(target.pidfd, 30)
        os.close(target.pidfd)


@contextlib.contextmanager
def systemd(traces: Path | None) -> Iterator[Stopper]:
    """Raises needs.Missing, as boot() does."""
    guest_image()  # build it here: in the system, the checkout is read-only
    with container.boot() as system:
        yield Systemd(system)


def libvirt(*options: str) -> Policy:
    """Return the policy that stops guests with `virsh destroy` and these options."""

    @contextlib.contextmanager
    def begin(traces: Path | None) -> Iterator[Stopper]:
        peer.programs()
        guest_image()
        with container.boot() as system:
            yield Libvirt(system, options)

    return begin
