"""A process held by a pidfd. Sources: pidfd_open(2), pidfd_send_signal(2).

The pidfd comes first and the identity second: what is read of /proc/PID while the pidfd says that
the process lives belongs to that process, for its pid cannot have been given to another.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

from qkilld.adapters import procfs
from qkilld.model.errors import Exiting, Failed, NoSuchProcess, NotQemu, ProcessChanged
from qkilld.model.guest import Guest, Identity, Label


class PidfdProcess:
    """Implements engine.ports.Process. `guest` has an empty label until `set_label`."""

    def __init__(self, pidfd: int, guest: Guest, proc: Path) -> None:
        self.guest = guest
        self._pidfd = pidfd
        self._proc = proc
        self._watched_by: asyncio.AbstractEventLoop | None = None

    @property
    def identity(self) -> Identity:
        return self.guest.identity

    def identify(self) -> Identity:
        """Read again who it is: it may have executed another program. Raises as `open_process`."""
        self.guest = Guest(_identify(self.identity.pid, self._pidfd, self._proc), self.guest.label)
        return self.guest.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def exited(self) -> bool:
        return _exited(self._pidfd)

    def collected(self) -> bool:
        try:
            stat = procfs.read_stat(self.identity.pid, self._proc)
        except OSError:
            return True
        return stat.start_time != self.identity.start_time

    def watch(self, callback: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._unwatch()

        def exited() -> None:
            self._unwatch()
            callback()

        loop.add_reader(self._pidfd, exited)
        self._watched_by = loop

    def fileno(self) -> int:
        """The pidfd, while it is held."""
        return self._pidfd

    def close(self) -> None:
        self._unwatch()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _unwatch(self) -> None:
        if self._watched_by is not None:
            self._watched_by.remove_reader(self._pidfd)
            self._watched_by = None


def open_process(pid: int, proc: Path = procfs.PROC) -> PidfdProcess:
    """Take hold of a process and read who it is; close it when done.

    Raises NoSuchProcess (also for a thread's id and for a zombie), Exiting, NotQemu where the
    kernel does not show what it runs, Failed where no descriptor is to be had.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OverflowError:
        raise NoSuchProcess(f"No process has the id {pid}") from None
    except OSError as error:
        # A thread's id: EINVAL up to Linux 6.8, ENOENT since.
        if pid > 0 and error.errno in (errno.EINVAL, errno.ENOENT):
            raise NoSuchProcess(
                f"{pid} is the id of a thread; give the id of its process"
            ) from None
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise NoSuchProcess(f"No process has the id {pid}") from None
        raise Failed(
            f"Cannot take hold of process {pid}: {os.strerror(error.errno or 0)}"
        ) from None
    try:
        identity = _identify(pid, pidfd, proc)
    except BaseException:
        os.close(pidfd)
        raise
    return PidfdProcess(pidfd, Guest(identity, Label()), proc)


def adopt_process(pidfd: int, guest: Guest, proc: Path = procfs.PROC) -> PidfdProcess:
    """Take over a pidfd that was kept of a guest's process; it may have exited since.

    Raises ProcessChanged where it is no pidfd or one of another process; the descriptor stays the
    caller's own then.
    """
    pid = _pid_of(pidfd)
    if pid is None:
        raise ProcessChanged("it is no pidfd")
    try:
        # Not there or -1: it has been collected. Then no signal can reach anybody through it.
        if pid > 0 and (
            pid != guest.identity.pid
            or procfs.read_stat(pid, proc).start_time != guest.identity.start_time
        ):
            raise ProcessChanged("it is a pidfd of another process")
    except OSError:
        if not _exited(pidfd):
            raise ProcessChanged("what process it is of cannot be told") from None
    return PidfdProcess(pidfd, guest, proc)


def _pid_of(pidfd: int) -> int | None:
    """From the line "Pid:" of its fdinfo, pidfd_open(2); None where it is no pidfd."""
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("Pid:")]
    return int(found[0]) if found else None


def _identify(pid: int, pidfd: int, proc: Path) -> Identity:
    try:
        identity = procfs.read_identity(pid, proc)
        exiting = not identity.executable and procfs.read_stat(pid, proc).exiting
    except PermissionError:
        if _exited(pidfd):
            raise _already_gone(pid) from None
        raise NotQemu(
            f"The kernel does not show qkilld what process {pid} runs: it may be no QEMU"
        ) from None
    except OSError:
        raise NoSuchProcess(f"Process {pid} has just exited") from None
    if _exited(pidfd):
        raise _already_gone(pid)
    if exiting:
        # The kernel takes a guest's memory apart, or waits for its I/O: that may last.
        raise Exiting(identity.key)
    return identity


def _already_gone(pid: int) -> NoSuchProcess:
    return NoSuchProcess(f"Process {pid} has exited already; only its parent has yet to collect it")


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
