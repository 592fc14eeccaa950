"""What the rows and the columns of the shutdown matrix agree on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from qkilld.model.guest_state import GuestOrder
from tests.lab import needs
from tests.lab.bare import BareGuest, bare_guest
from tests.lab.process import end, spawn


@dataclass(frozen=True)
class Kept:
    """What is on the disks afterwards."""

    count: int
    of: int
    notes: tuple[str, ...] = ()
    """Printable: whether the file system is clean, say."""


class Domain(Protocol):
    """A guest that libvirt has started, as its host sees it."""

    def shutdown(self) -> None:
        """virsh shutdown, which returns when the guest was asked."""

    def destroy(self) -> None:
        """virsh destroy."""

    def terminate(self, timeout_s: float) -> dict[str, object]:
        """qkillctl terminate --powerdown --force --wait; the result and the receipt."""


@dataclass(frozen=True)
class Target:
    """A running QEMU."""

    pid: int
    pidfd: int
    domain: Domain | None = None

    def signal(self, number: signal.Signals) -> None:
        """Does nothing if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class Launcher(Protocol):
    """Who starts the guest."""

    def bare(
        self, directory: Path, words: Sequence[str]
    ) -> contextlib.AbstractContextManager[tuple[BareGuest, Target]]:
        """A guest without an operating system (tests.lab.bare)."""

    def start(
        self, directory: Path, words: Sequence[str]
    ) -> contextlib.AbstractContextManager[Target]:
        """A QEMU with these arguments and 256 MiB."""


class Direct:
    """This process starts it."""

    @contextlib.contextmanager
    def bare(self, directory: Path, words: Sequence[str]) -> Iterator[tuple[BareGuest, Target]]:
        with bare_guest(directory, words) as guest:
            yield guest, Target(guest.pid, guest.pidfd)

    @contextlib.contextmanager
    def start(
        self, directory: Path, words: Sequence[str], qemu: str = "qemu-system-x86_64"
    ) -> Iterator[Target]:
        program = needs.program(qemu, "qemu-system-x86 qemu-system-arm").resolve()
        own = [
            str(program),
            "-name",
            "guest=lab",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        with (directory / "stderr").open("wb") as said:
            process = spawn([*own, *words], stdout=said, stderr=said)
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Target(process.pid, pidfd)
        finally:
            end(process)
            os.close(pidfd)


def nothing() -> None:
    pass


@dataclass
class Scene:
    """A guest that is about to be stopped."""

    target: Target
    qmp: Path
    count: Callable[[], Kept]
    """To be called when nobody has its disks open."""
    later: Sequence[tuple[float, Callable[[], None]]] = ()
    """What happens so many seconds after the request."""
    recover: Callable[[], None] = nothing
    """Brings the storage back, so that what is left of the guest can end."""
    agent: Path | None = None
    """The socket of its agent, if that runs."""


Make = Callable[[Path, Launcher], contextlib.AbstractContextManager[Scene]]

EVERYBODY: Final = ("qkilld", "virsh", "sigterm", "proxmox", "press")


@dataclass(frozen=True)
class Row:
    title: str
    make: Make
    kept: int = 300
    """At least so many records or files are kept by qkilld."""
    result: tuple[str, ...] = ("exited",)
    """How it ends with qkilld."""
    at_risk: tuple[str, ...] = ()
    """The codes that its receipt has at least."""
    asked: str = "deaf"
    """What becomes of asking with qkilld."""
    note: str = ""
    """What qkilld leaves behind, of Kept.notes."""
    help: tuple[GuestOrder, ...] = ()
    """What qkilld may do so that the guest can be asked."""
    columns: tuple[str, ...] = EVERYBODY
    by_libvirt: bool = False
    """libvirt has started the guest, whoever stops it."""
    works_s: float = 0
    """For how long (s) stopping it keeps a processor busy."""
