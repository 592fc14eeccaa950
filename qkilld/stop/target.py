"""Which processes are to be stopped, and hold of them."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qkilld.adapters import procfs
from qkilld.judgement.target import is_qemu
from qkilld.model.errors import Failed, InvalidArgs, NoSuchProcess
from qkilld.model.guest import Unit
from qkilld.stop.options import Options


@dataclass(slots=True)
class Target:
    """A process that is held: whatever becomes of its pid, this is the same process."""

    pid: int
    pidfd: int
    start_time: int | None
    """Clock ticks since boot. None where /proc does not show it to us (ProtectProc=)."""

    def exited(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def gone(self) -> None:
        """Return when it has exited. For one at a time."""
        import asyncio

        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self.pidfd)

    def close(self) -> None:
        os.close(self.pidfd)


def hold(pid: int, start_time: int | None = None) -> Target:
    """Raises NoSuchProcess where it is gone, or another one than started at `start_time`; Failed.

    A zombie is gone.
    """
    try:
        target = Target(pid, os.pidfd_open(pid), None)
    except (ProcessLookupError, OverflowError):
        raise NoSuchProcess(f"process {pid} is gone") from None
    except OSError as error:
        raise Failed(f"cannot take hold of process {pid}: {error.strerror}") from None
    # It may be hidden, or gone: the descriptor knows which.
    with contextlib.suppress(OSError):
        target.start_time = procfs.read_stat(pid).start_time
    if target.exited() or (start_time is not None and target.start_time != start_time):
        target.close()
        raise NoSuchProcess(f"process {pid} is gone")
    return target


class Finder:
    """Finds what the command line and the environment name."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._main_pid = environment.get("MAINPID", "")
        self.unit = procfs.read_unit(os.getpid())
        """The one that this program runs in."""
        # A shell of somebody's session is in a unit too, with guests that are none of our business.
        self.by_systemd = environment.get("SYSTEMD_EXEC_PID") in (
            str(os.getpid()),
            str(os.getppid()),
        )
        """A manager of systemd started this, itself or through a shell: systemd.exec(5)."""

    @property
    def in_own_unit(self) -> bool:
        """What is to be stopped is in our own unit, whatever process of it was named."""
        options = self._options
        elsewhere = options.everyone or options.pid is not None or options.unit is not None
        return self.by_systemd and not elsewhere

    def named(self) -> Target | None:
        """The one process that is named; None where it is a unit that is, or everyone.

        Raises NoSuchProcess where the process is gone, InvalidArgs where nothing is named, and what
        reading a pidfile raises.
        """
        if self._options.unit is not None or self._options.everyone:
            return None
        if self._options.pid is not None:
            return hold(self._options.pid)
        if self._options.pidfile is not None:
            return _of_pidfile(self._options.pidfile)
        text = self._main_pid
        if not text and self.by_systemd:
            return None
        if not text:
            raise InvalidArgs(
                "nothing to stop is named: without options this is for ExecStop= of a unit. "
                "Elsewhere give --pid, --pidfile or --unit, see --help"
            )
        if not (text.isascii() and text.isdecimal() and len(text) < 11 and int(text) > 0):
            raise InvalidArgs("$MAINPID is not the id of a process")
        target = hold(int(text))
        # systemd had the process when it started us: one that is younger has its id by chance.
        if target.start_time is not None and target.start_time > _own_start():
            target.close()
            raise NoSuchProcess("the main process is gone")
        return target

    def in_unit(self, globs: Iterable[str]) -> list[Target]:
        """Every QEMU that can be seen in the unit that is named, or in our own."""
        units = [self.unit]
        if (name := self._options.unit) is not None:
            units = [Unit(name), Unit(self.unit.system, name)]
        found = (_qemu(pid, globs) for pid in procfs.pids() if procfs.read_unit(pid) in units)
        return [target for target in found if target is not None]

    def of_manager(self, globs: Iterable[str]) -> list[tuple[Target, str]]:
        """Every QEMU that can be seen, with its unit, "" for none: those of the whole system, or
        where our own manager is a user's, those of that manager."""
        found = []
        for pid in procfs.pids():
            unit = procfs.read_unit(pid)
            if self.unit.user and unit.system != self.unit.system:
                continue
            if (target := _qemu(pid, globs)) is not None:
                found.append((target, unit.user if self.unit.user else unit.system))
        return found


def ran_for_s() -> float:
    """Seconds since this program was started, to 10 ms."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _own_start() / os.sysconf("SC_CLK_TCK")


def _own_start() -> int:
    return procfs.read_stat(os.getpid()).start_time


def _qemu(pid: int, globs: Iterable[str]) -> Target | None:
    if pid == os.getpid():
        return None
    try:
        target = hold(pid)
    except (NoSuchProcess, Failed):
        return None
    try:
        if is_qemu(procfs.read_executable(pid)[0], globs):
            return target
    except OSError:
        pass  # it is not ours to see
    target.close()
    return None


def _of_pidfile(path: str) -> Target:
    from qkilld.adapters import pidfile

    if not os.path.lexists(path):
        # QEMU removes its own when it exits.
        raise NoSuchProcess("there is no such pidfile")
    found = pidfile.read(path)
    return hold(found.pid, found.start_time)
