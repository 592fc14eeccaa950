"""Find the processes to stop, and open each as a pidfd."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qkilld.adapters import blockable, procfs
from qkilld.debug_log import ignore, note
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import Failed, InvalidArgs, NoSuchProcess, UnknownIdentity
from qkilld.model.guest import Unit
from qkilld.model.policy import is_qemu
from qkilld.stop import process as stop_process
from qkilld.stop.options import Options
from qkilld.stop.process import (
    ProcessHandle,
    open_main_process,
    open_named,
    open_process,
    stops_unit,
)

MAX_PIDS = 20
"""The maximum number of unidentified processes that a message names."""


@dataclass(frozen=True, slots=True)
class OutsideGuest:
    """A QEMU process outside of our own unit."""

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
        self.stops_unit = stops_unit(environment)
        self.unidentified: list[int] = []
        """The processes that may be guests to stop, but that the last search could not identify."""
        self.denied: list[int] = []
        """The processes of the unit whose executable the last search was not permitted to read."""

    @property
    def in_own_unit(self) -> bool:
        """Whether to stop guests of our own unit. $MAINPID or a pidfile may name one of them."""
        options = self._options
        named = options.pid is not None and not self._names_main_process
        other_target = options.all_guests or named or options.unit is not None
        return self.stops_unit and not other_target

    @property
    def _names_main_process(self) -> bool:
        """Whether the command line has `--pid $MAINPID`."""
        pid = self._options.pid
        return pid is not None and str(pid or "") == self._main_pid

    def named(self) -> ProcessHandle | None:
        """Return the named process. Return None with --all, with --unit, or for our own unit if
        systemd sets no $MAINPID.

        Raises InvalidArgs if nothing is named. Also raises what `open_main_process` and
        `pidfile.read` raise.
        """
        if self._options.unit is not None or self._options.all_guests:
            return None
        if self._options.pid is not None and not self._names_main_process:
            return open_named(self._options.pid)
        if self._options.pidfile is not None:
            return _of_pidfile(self._options.pidfile)
        if not self._main_pid and self.stops_unit:
            return None
        if not self._main_pid:
            raise InvalidArgs(
                "nothing to stop is named: without options, qkilld-stop is for ExecStop= of a "
                "unit. Otherwise give --pid, --pidfile or --unit, see --help"
            )
        return open_main_process(self._main_pid)

    def in_unit(self, globs: Iterable[str]) -> list[ProcessHandle]:
        """Return every visible QEMU in the named unit, or in our own if none is named.

        If no QEMU is found, an error is raised in two cases. UnknownIdentity: a process that may be
        in the unit cannot be identified. Failed: the unit of a visible QEMU, or the executable of a
        process in the unit, is unreadable.
        """
        name = self._options.unit
        units: list[Unit] = []
        if name is not None:
            units.append(Unit(name))
        if self.unit is not None and self.unit.name:
            units.append(self.unit if name is None else Unit(self.unit.system, name))

        def is_unknown(unit: Unit | None) -> bool:
            return unit is None or (name is None and self.unit is None)

        inside, hidden = [], []
        for process, unit in self._qemus(globs, lambda unit: unit in units or is_unknown(unit)):
            if unit in units or (unit is None and name is None and _in_own_cgroup(process.pid)):
                inside.append(process)
                continue
            if is_unknown(unit):
                hidden.append(process.pid)
            process.close()
        self.denied = [
            pid
            for pid in self.denied
            if procfs.read_unit(pid) in units and not _is_pam_session(pid)
        ]
        if self.unidentified and not inside:
            raise self.unknown_identity()
        if self.denied and not inside:
            raise Failed(
                f"cannot tell whether process {_shown(self.denied)} in {name or 'the unit'} is a"
                " QEMU: qkilld-stop is not permitted to see its executable (User=, PrivateUsers=)."
                " Write + before the path in ExecStop=, or run qkilld-stop as root"
            )
        if hidden and not inside:
            raise Failed(
                f"cannot tell whether process {_shown(hidden)} runs in "
                f"{name or 'the unit of qkilld-stop'}: process 1 or that process is hidden "
                "(ProtectProc=, hidepid=). Name the process to stop with --pid or --pidfile"
            )
        return inside

    def outside(self, globs: Iterable[str]) -> Iterator[OutsideGuest]:
        """Yield each visible QEMU outside of our own unit, if its unit is known. Reads command
        lines, so it may block forever."""
        for process, unit in _qemus(globs, lambda unit: False, [], []):
            if unit is not None and unit != self.unit:
                with ignore(f"reading the command line of process {process.pid}", OSError):
                    words = tuple(procfs.read_command_line(process.pid))
                    name = procfs.read_names(process.pid)[0] or ""
                    yield OutsideGuest(process.pid, name, words, unit.name)
            process.close()

    def of_manager(self, globs: Iterable[str]) -> list[tuple[ProcessHandle, str | None]]:
        """Return every visible QEMU that our service manager manages, with its unit ("" for none,
        None if unknown).

        For the system's manager, return all visible QEMUs. Raises Failed if our own manager is
        unknown.
        """
        if self.unit is None:
            raise Failed(
                "cannot tell whose guests these are: process 1 is hidden (ProtectProc=, hidepid=)"
            )
        own = self.unit
        guests: list[tuple[ProcessHandle, str | None]] = []
        for process, unit in self._qemus(
            globs, lambda unit: unit is None or not own.user or unit.system == own.system
        ):
            if unit is None:
                guests.append((process, None))
            elif not own.user:
                guests.append((process, unit.system))
            elif unit.system == own.system:
                guests.append((process, unit.user))
            else:
                process.close()
        return guests

    def unknown_identity(self) -> UnknownIdentity:
        """Make the error for the processes in `unidentified`."""
        return UnknownIdentity(
            f"cannot tell whether process {_shown(self.unidentified)} is a guest to stop: the"
            " kernel does not show its executable at the moment. Try again later"
        )

    def read_unidentified_again(self, globs: Iterable[str]) -> None:
        """Remove from `unidentified` the processes that have exited meanwhile, or turn out not to
        be QEMU. Waits only briefly for a process that blocks the reading."""
        # If no thread can be started, do not read here: a blocked read would make systemd wait
        # although the guests are gone.
        blockable.shared.may_block_caller = False
        self.unidentified = [
            pid
            for pid, executable in procfs.read_executables(self.unidentified)
            if _may_be_qemu(pid, executable, globs)
        ]

    def _qemus(
        self, globs: Iterable[str], concerns: Callable[[Unit | None], bool]
    ) -> Iterator[tuple[ProcessHandle, Unit | None]]:
        """Call the function `_qemus`, and set `unidentified` and `denied`."""
        self.unidentified, self.denied = [], []
        yield from _qemus(globs, concerns, self.unidentified, self.denied)


def _in_own_cgroup(pid: int, proc: Path = procfs.PROC) -> bool:
    """Return whether a process is known to be in our own control groups, and so in our own service.
    Unlike procfs.read_unit(), this does not need process 1, which may be hidden."""
    with ignore(f"reading the control groups of process {pid}", OSError):
        own, its = ((proc / name / "cgroup").read_bytes() for name in ("self", str(pid)))
        # With Delegate=, systemd runs ExecStop= in a control group below that of the service.
        return own.replace(b"/.control\n", b"\n") == its and b".service\n" in its
    return False


def _is_pam_session(pid: int) -> bool:
    """Return whether this is systemd's process for a PAM session (PAMName=). Each command of the
    unit has such a process, qkilld-stop too. The unit's user is not permitted to read the
    executable of such a process. A QEMU can have any name (-name process=), but always has several
    threads."""
    with ignore(f"reading the name of process {pid}", OSError):
        stat = procfs.read_stat(pid)
        return stat.comm == b"(sd-pam)" and stat.threads == 1
    return False


def _shown(pids: Sequence[int]) -> str:
    more = " and others" if len(pids) > MAX_PIDS else ""
    return " ".join(map(str, pids[:MAX_PIDS])) + more


def _qemus(
    globs: Iterable[str],
    concerns: Callable[[Unit | None], bool],
    unidentified: list[int],
    denied: list[int],
) -> Iterator[tuple[ProcessHandle, Unit | None]]:
    """Yield an open handle of every visible QEMU, with its unit. The caller closes the handles.

    A process whose executable this program is not permitted to read is appended to `denied`. If the
    executable cannot be read for another reason, and the process is in a unit that `concerns` the
    caller, retry for IDENTITY_TIMEOUT_S, then append the process to `unidentified`.
    """
    pids, until = procfs.pids(), time.monotonic() + stop_process.IDENTITY_TIMEOUT_S
    while pids:
        unread = []
        for pid, executable in procfs.read_executables(pids):
            try:
                process = _qemu(pid, executable, globs)
            except (NoSuchProcess, FileNotFoundError, ProcessLookupError) as error:
                note(f"identifying process {pid}", error)
                continue
            except PermissionError as error:
                note(f"identifying process {pid}", error)
                denied.append(pid)
                continue
            except Exception as error:
                note(f"identifying process {pid}", error)
                if concerns(procfs.read_unit(pid)):
                    unread.append(pid)
                continue
            if process is None:
                continue
            # Read the unit while the process is open. If the pid was reused before that, `exited`
            # is True, and the unit is not used.
            unit = procfs.read_unit(pid)
            if process.exited():
                process.close()
            else:
                yield process, unit
        if unread and time.monotonic() > until:
            unidentified += unread
            return
        pids = unread
        if pids:
            time.sleep(stop_process.IDENTITY_RETRY_S)


def _qemu(
    pid: int, executable: tuple[str, bool] | Exception, globs: Iterable[str]
) -> ProcessHandle | None:
    """Open a process, and check once more that it is QEMU; return None if it is not.

    Raises `executable` if that is an exception, OSError, and what `open_process` raises.
    """
    if isinstance(executable, Exception):
        raise executable
    if pid == os.getpid() or not is_qemu(executable[0], globs):
        return None
    process = open_process(pid)
    try:
        if is_qemu(procfs.read_executable(pid)[0], globs):
            return process
    except BaseException:
        process.close()
        raise
    process.close()
    return None


def _may_be_qemu(pid: int, executable: tuple[str, bool] | Exception, globs: Iterable[str]) -> bool:
    """Return whether the process exists and may be QEMU, even if it is exiting."""
    if not isinstance(executable, Exception) and executable[0]:
        return is_qemu(executable[0], globs)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError as error:
        note(f"opening process {pid}", error)
        return True
    process = ProcessHandle(pid, pidfd, None)
    try:
        return not process.exited()
    finally:
        process.close()


def _of_pidfile(path: str) -> ProcessHandle:
    from qkilld.adapters import pidfile

    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        # QEMU removes its pidfile when it exits, so a missing pidfile means that the process is
        # gone.
        raise NoSuchProcess("the pidfile does not exist") from None
    except OSError as error:
        note(f"looking for the pidfile {path}", error)  # `read` raises the error.
    named = pidfile.read(path)
    return open_named(named.pid, named.start_time)
