"""The types that the rows and the columns of the shutdown matrix share."""

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
class RecordCount:
    """The records or files on the disks after the stop."""

    count: int
    of: int
    notes: tuple[str, ...] = ()
    """Remarks for the table, such as whether the file system is clean."""


class Domain(Protocol):
    """A guest that libvirt has started."""

    def shutdown(self) -> None:
        """Run virsh shutdown. It returns when the guest has been asked."""

    def destroy(self) -> None:
        """Run virsh destroy."""

    def terminate(self, timeout_s: float) -> dict[str, object]:
        """Run qkillctl terminate --powerdown --force --wait; return the result and the receipt."""


@dataclass(frozen=True)
class GuestHandle:
    """A running QEMU process."""

    pid: int
    pidfd: int
    domain: Domain | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. Does nothing if the process has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class Launcher(Protocol):
    """Starts guests."""

    def bare(
        self, directory: Path, words: Sequence[str]
    ) -> contextlib.AbstractContextManager[tuple[BareGuest, GuestHandle]]:
        """Start a guest without an operating system (tests.lab.bare)."""

    def start(
        self, directory: Path, words: Sequence[str]
    ) -> contextlib.AbstractContextManager[GuestHandle]:
        """Start QEMU with these arguments and 256 MiB."""


class ProcessLauncher:
    """Starts guests as children of this process."""

    @contextlib.contextmanager
    def bare(
        self, directory: Path, words: Sequence[str]
    ) -> Iterator[tuple[BareGuest, GuestHandle]]:
        with bare_guest(directory, words) as guest:
            yield guest, GuestHandle(guest.pid, guest.pidfd)

    @contextlib.contextmanager
    def start(
        self, directory: Path, words: Sequence[str], qemu: str = "qemu-system-x86_64"
    ) -> Iterator[GuestHandle]:
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
            yield GuestHandle(process.pid, pidfd)
        finally:
            end(process)
            os.close(pidfd)


def nothing() -> None:
    pass


@dataclass
class Scene:
    """A guest that is about to be stopped."""

    target: GuestHandle
    qmp: Path
    count: Callable[[], RecordCount]
    """Counts the records. Call it when no process has the disks open."""
    later: Sequence[tuple[float, Callable[[], None]]] = ()
    """Functions to call, each with its time in seconds after the request."""
    recover: Callable[[], None] = nothing
    """Makes the storage work again, so that a hung guest can exit."""
    agent: Path | None = None
    """The socket of the guest's agent; None if no agent runs."""


Make = Callable[[Path, Launcher], contextlib.AbstractContextManager[Scene]]

EVERYBODY: Final = ("qkilld", "virsh", "sigterm", "proxmox", "press")


@dataclass(frozen=True)
class Row:
    title: str
    make: Make
    kept: int = 300
    """The minimum number of records or files that qkilld must keep."""
    result: tuple[str, ...] = ("exited",)
    """The allowed results of qkilld's job."""
    at_risk: tuple[str, ...] = ()
    """The codes that qkilld's receipt must contain."""
    asked: str = "deaf"
    """The expected `guest_asked` of qkilld's job: how the guest reacted when it was asked."""
    note: str = ""
    """A remark that RecordCount.notes must contain after qkilld's stop."""
    help: tuple[GuestOrder, ...] = ()
    """What qkilld may do to the guest so that it can be asked to shut down."""
    columns: tuple[str, ...] = EVERYBODY
    by_libvirt: bool = False
    """Whether libvirt starts the guest in every column, not only in the column of virsh."""
    works_s: float = 0
    """How long (s) the stop keeps a processor busy."""
