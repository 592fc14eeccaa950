"""A process opened by pidfd. Sources: pidfd_open(2), pidfd_send_signal(2).

The pidfd is opened first, and then the identity is read. As long as the pidfd shows that the
process is alive, its pid cannot be reused, so /proc/PID belongs to it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary, ref

from qkilld.adapters import procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.debug_log import note_once
from qkilld.engine.steps import job_steps
from qkilld.model.errors import Failed, NoSuchProcess, NotQemu, ProcessChanged, UnknownIdentity
from qkilld.model.guest import Guest, Identity, Label

_GET_INFO: Final = 0xC040FF0B
"""PIDFD_GET_INFO: include/uapi/linux/pidfd.h. Since Linux 6.13."""
_INFO: Final = struct.Struct("=Q52xi")
"""The first version of struct pidfd_info: its mask and its exit_code."""
_INFO_EXIT: Final = 1 << 3
MAX_EXITS: Final = 64
"""The maximum number of exits that are handled in one iteration of the event loop."""


class PidfdProcess:
    """Implements engine.ports.Process. After `open_process`, the label is unset; see
    `set_label`."""

    __slots__ = ("_exits", "_on_exit", "_pidfd", "_proc", "guest")

    def __init__(self, pidfd: int, guest: Guest, proc: Path) -> None:
        self.guest = guest
        self._pidfd = pidfd
        self._proc = proc
        self._exits: _Exits | None = None
        self._on_exit: Callable[[], None] | None = None

    @property
    def identity(self) -> Identity:
        return self.guest.identity

    def identify(self) -> Identity:
        """Read the identity again: execve(2) may have changed it. Raises as `open_process` does."""
        identity = _identify(self.identity.pid, self._pidfd, self._proc)
        if identity != self.identity:
            self.guest = Guest(identity, self.guest.label)
        return self.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def exited(self) -> bool:
        return _exited(self._pidfd)

    def collected(self) -> bool:
        try:
            stat = procfs.read_stat(self.identity.pid, self._proc)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError as error:
            note_once(f"looking whether process {self.identity.pid} was collected", error)
            return False
        return stat.start_time != self.identity.start_time

    def exit_status(self) -> int:
        try:
            stat = procfs.read_stat(self.identity.pid, self._proc)
            if stat.start_time == self.identity.start_time:
                return stat.exit_status
        except OSError as error:
            note_once(f"looking how process {self.identity.pid} has ended", error)
        return _exit_status(self._pidfd)

    def dying(self) -> bool:
        try:
            return self.exited() or procfs.is_dying(self.identity.pid, self._proc)
        except OSError as error:
            note_once(f"looking whether process {self.identity.pid} is dying", error)
            return self.exited()

    def watch(self, callback: Callable[[], None]) -> None:
        self._unwatch()
        exits = _exits()
        exits.add(self._pidfd, self._has_exited)  # May raise OSError.
        self._exits, self._on_exit = exits, callback

    def _has_exited(self) -> None:
        self._exits = None
        job_steps().put(self.identity.uid, self._call_back)

    def _call_back(self) -> bool:
        callback, self._on_exit = self._on_exit, None
        if callback is not None:
            callback()
        return False

    def fileno(self) -> int:
        """Return the pidfd; -1 after `close`."""
        return self._pidfd

    def close(self) -> None:
        self._unwatch()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _unwatch(self) -> None:
        if self._exits is not None:
            self._exits.remove(self._pidfd)
        self._exits = self._on_exit = None


class _Exits:
    """Watches pidfds in one event loop. A user may end thousands of processes at a time, so each
    iteration of the loop handles only MAX_EXITS, and jobs act on the exits in steps (engine.steps).
    An object has an epoll descriptor only while it watches pidfds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._epoll = select.epoll()
        self._epoll.close()
        self._watched: dict[int, Callable[[], None]] = {}
        """The function to call for each pidfd."""

    def add(self, pidfd: int, callback: Callable[[], None]) -> None:
        loop = self._loop()
        if not self._watched:
            self._epoll = select.epoll()
            if loop is not None:
                loop.add_reader(self._epoll.fileno(), self._look)
        self._epoll.register(pidfd, select.EPOLLIN)
        self._watched[pidfd] = callback

    def remove(self, pidfd: int) -> None:
        del self._watched[pidfd]
        self._epoll.unregister(pidfd)
        loop = self._loop()
        if not self._watched:
            if loop is not None:
                loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _look(self) -> None:
        for pidfd, _ in self._epoll.poll(0, MAX_EXITS):
            callback = self._watched[pidfd]
            self.remove(pidfd)
            callback()


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Exits] = WeakKeyDictionary()


def _exits() -> _Exits:
    """Return the object for the running loop."""
    loop = asyncio.get_running_loop()
    if (exits := _of_loop.get(loop)) is None:
        exits = _of_loop[loop] = _Exits(loop)
    return exits


def open_process(pid: int, proc: Path = procfs.PROC) -> PidfdProcess:
    """Open a process and read its identity; the caller closes it.

    Raises NoSuchProcess if there is no such process, or it is a thread or a zombie; NotQemu if the
    kernel does not show the executable; UnknownIdentity if the process blocks the reading; Failed
    for other errors, such as EMFILE.
    """
    process = open_unidentified(Guest(Identity.unread(pid), Label()), proc)
    try:
        process.identify()
    except BaseException:
        process.close()
        raise
    return process


def open_unidentified(guest: Guest, proc: Path = procfs.PROC) -> PidfdProcess:
    """Open the process that has the guest's id now. This may be another process, so the caller
    must check its identity before it sends a signal. Raises NoSuchProcess, Failed."""
    return PidfdProcess(_open_pidfd(guest.identity.pid), guest, proc)


def _open_pidfd(pid: int) -> int:
    """Raises NoSuchProcess, Failed."""
    try:
        return os.pidfd_open(pid)
    except OverflowError:
        raise NoSuchProcess(f"No process has the id {pid}") from None
    except OSError as error:
        # For a thread's id, the error is EINVAL up to Linux 6.8, ENOENT in later versions.
        if pid > 0 and error.errno in (errno.EINVAL, errno.ENOENT):
            raise NoSuchProcess(
                f"{pid} is the id of a thread; give the id of its process"
            ) from None
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise NoSuchProcess(f"No process has the id {pid}") from None
        raise Failed(f"Cannot open process {pid}: {os.strerror(error.errno or 0)}") from None


def adopt_process(pidfd: int, guest: Guest, proc: Path = procfs.PROC) -> PidfdProcess:
    """Use a pidfd that was stored for a guest's process. The process may have exited. If the
    process blocks the reading of its start time, the start time is checked later, before a signal
    is sent.

    Raises ProcessChanged if the descriptor is not a pidfd of this process, or if the start time
    cannot be read for another reason. The caller then still owns the descriptor.
    """
    pid = _pid_of(pidfd)
    if pid is None:
        raise ProcessChanged("it is not a pidfd")
    try:
        # If the pid is -1, the process was reaped, so a signal through the pidfd has no effect.
        if pid > 0 and (
            pid != guest.identity.pid
            or procfs.read_stat(pid, proc).start_time != guest.identity.start_time
        ):
            raise ProcessChanged("it is a pidfd of another process")
    except Unanswered as error:
        note_once(f"reading the start time of process {pid}", error)
    except OSError:
        if not _exited(pidfd):
            raise ProcessChanged("its process cannot be identified") from None
    return PidfdProcess(pidfd, guest, proc)


def _pid_of(pidfd: int) -> int | None:
    """Return "Pid:" from the descriptor's fdinfo, pidfd_open(2); None if it is not a pidfd."""
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    except OSError as error:
        note_once(f"looking what descriptor {pidfd} is", error)
        return None
    pids = [line.split()[1] for line in lines if line.startswith("Pid:")]
    return int(pids[0]) if pids else None


def _identify(pid: int, pidfd: int, proc: Path) -> Identity:
    try:
        identity = procfs.read_identity(pid, proc)
    except PermissionError:
        if _exited(pidfd):
            raise _already_gone(pid) from None
        raise NotQemu(
            f"The kernel does not show qkilld the program of process {pid}: it may not be QEMU"
        ) from None
    except (FileNotFoundError, ProcessLookupError):
        # The process has exited, or /proc hides it (hidepid=).
        if _exited(pidfd):
            raise NoSuchProcess(f"Process {pid} has just exited") from None
        raise Failed(f"Process {pid} cannot be seen in /proc") from None
    except Unanswered as error:
        raise UnknownIdentity.blocked(pid, error.strerror) from None
    except OSError as error:
        raise _unreadable(pid, error) from None
    if _exited(pidfd):
        raise _already_gone(pid)
    return identity


def _unreadable(pid: int, error: OSError) -> Failed:
    return Failed(f"Cannot identify process {pid}: {os.strerror(error.errno or 0)}")


def _already_gone(pid: int) -> NoSuchProcess:
    return NoSuchProcess(f"Process {pid} has exited already; only its parent has yet to collect it")


def _exit_status(pidfd: int) -> int:
    """Return the exit status of a reaped process in the form of wait(2); 0 if unknown. Before Linux
    6.15, it is always unknown."""
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError as error:
        note_once("asking a pidfd how its process has ended", error)
        return 0
    mask, status = _INFO.unpack(info)
    return status if mask & _INFO_EXIT else 0


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
