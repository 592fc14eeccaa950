"""Find the processes to stop, and open each as a pidfd."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from qkilld.adapters import procfs
from qkilld.debug_log import ignore, note
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import Failed, InvalidArgs, NoSuchProcess
from qkilld.model.guest import Unit
from qkilld.model.policy import is_qemu
from qkilld.stop.options import Options
from qkilld.stop.process import (
    ProcessHandle,
    by_systemd,
    open_main_process,
    open_named,
    open_process,
)


@dataclass(frozen=True, slots=True)
class OutsideGuest:
    """A QEMU outside of our own unit."""

    pid: int
    name: str
    words: tuple[str, ...]
    """The command line of the process."""
    unit: str
    """"" for none."""


class ProcessFinder:
    """Finds the processes named by the command line and the environment."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._main_pid = environment.get("MAINPID", "")
        self.unit = procfs.read_unit(os.getpid())
        """The unit in which this program runs; None if unreadable."""
        self.by_systemd = by_systemd(environment)

    @property
    def in_own_unit(self) -> bool:
        """Whether to stop guests of our own unit. $MAINPID or a pidfile may name one of them."""
        options = self._options
        other_target = options.all_guests or options.pid is not None or options.unit is not None
        return self.by_systemd and not other_target

    def named(self) -> ProcessHandle | None:
        """Return the named process; None if the target is a whole unit (--unit, or our own unit if
        systemd gives no $MAINPID) or --all.

        Raises InvalidArgs if nothing is named. Also raises what `open_main_process` and
        `pidfile.read` raise.
        """
        if self._options.unit is not None or self._options.all_guests:
            return None
        if self._options.pid is not None:
            return open_named(self._options.pid)
        if self._options.pidfile is not None:
            return _of_pidfile(self._options.pidfile)
        if not self._main_pid and self.by_systemd:
            return None
        if not self._main_pid:
            raise InvalidArgs(
                "nothing to stop is named: without options, qkilld-stop is for ExecStop= of a "
                "unit. Otherwise give --pid, --pidfile or --unit, see --help"
            )
        return open_main_process(self._main_pid)

    def in_unit(self, globs: Iterable[str]) -> list[ProcessHandle]:
        """Return every visible QEMU in the named unit, or in our own.

        Raises Failed if there seems to be none, but the unit of a QEMU is unreadable.
        """
        name = self._options.unit
        units: list[Unit] = []
        if name is not None:
            units.append(Unit(name))
        if self.unit is not None and self.unit.name:
            units.append(self.unit if name is None else Unit(self.unit.system, name))
        inside, hidden = [], []
        for process, unit in _qemus(globs):
            if unit in units:
                inside.append(process)
                continue
            if unit is None or (name is None and self.unit is None):
                hidden.append(process.pid)
            process.close()
        if hidden and not inside:
            raise Failed(
                f"cannot tell whether process {' '.join(map(str, hidden))} runs in "
                f"{name or 'the unit of qkilld-stop'}: process 1 or that process is hidden "
                "(ProtectProc=, hidepid=). Name the process to stop with --pid or --pidfile"
            )
        return inside

    def outside(self, globs: Iterable[str]) -> Iterator[OutsideGuest]:
        """Yield each visible QEMU outside of our own unit, if its unit is known. Reads command
        lines, so it may block forever."""
        for process, unit in _qemus(globs):
            if unit is not None and unit != self.unit:
                with ignore(f"reading the command line of process {process.pid}", OSError):
                    words = tuple(procfs.read_command_line(process.pid))
                    name = procfs.read_names(process.pid)[0] or ""
                    yield OutsideGuest(process.pid, name, words, unit.name)
            process.close()

    def of_manager(self, globs: Iterable[str]) -> list[tuple[ProcessHandle, str | None]]:
        """Return every visible QEMU of our manager with its unit: "" for none, None if unknown.

        For the system manager, these are all QEMUs of the system. Raises Failed if our own manager
        is unknown.
        """
        if self.unit is None:
            raise Failed(
                "cannot tell whose guests these are: process 1 is hidden (ProtectProc=, hidepid=)"
            )
        guests: list[tuple[ProcessHandle, str | None]] = []
        for process, unit in _qemus(globs):
            if unit is None:
                guests.append((process, None))
            elif not self.unit.user:
                guests.append((process, unit.system))
            elif unit.system == self.unit.system:
                guests.append((process, unit.user))
            else:
                process.close()
        return guests


def _qemus(globs: Iterable[str]) -> Iterator[tuple[ProcessHandle, Unit | None]]:
    """Yield an open handle of every visible QEMU, with its unit. The caller closes the handles.

    Skips a process whose executable cannot be read, because it is hidden or blocks that.
    """
    for pid, executable in procfs.read_executables(procfs.pids()):
        if isinstance(executable, Exception):
            note(f"reading the executable of process {pid}", executable)
        elif is_qemu(executable[0], globs) and (process := _qemu(pid, globs)) is not None:
            # Read the unit while the process is open: if its pid was reused, `exited` shows that.
            unit = procfs.read_unit(pid)
            if process.exited():
                process.close()
            else:
                yield process, unit


def _qemu(pid: int, globs: Iterable[str]) -> ProcessHandle | None:
    """Open a process, and check once more that it is QEMU."""
    if pid == os.getpid():
        return None
    try:
        process = open_process(pid)
    except (NoSuchProcess, Failed) as error:
        note(f"opening process {pid}", error)
        return None
    try:
        if is_qemu(procfs.read_executable(pid)[0], globs):
            return process
    except OSError as error:
        note(f"reading the executable of process {pid}", error)
    process.close()
    return None


def _of_pidfile(path: str) -> ProcessHandle:
    from qkilld.adapters import pidfile

    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        # QEMU removes its pidfile when it exits, so a missing one means that the process is gone.
        raise NoSuchProcess("the pidfile does not exist") from None
    except OSError as error:
        note(f"looking for the pidfile {path}", error)  # `read` says why.
    named = pidfile.read(path)
    return open_named(named.pid, named.start_time)
