"""Choose the processes to stop. Most runs do not need this module, because $MAINPID is the
guest."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from qkilld.adapters import open_files, procfs
from qkilld.debug_log import ignore, note
from qkilld.model.constants import ExitCode
from qkilld.model.errors import Failed, NoSuchProcess, NotQemu, QkilldError
from qkilld.model.policy import Config
from qkilld.model.text import printable
from qkilld.stop.configuration import configuration
from qkilld.stop.finder import OutsideGuest, ProcessFinder
from qkilld.stop.log import say
from qkilld.stop.options import Options
from qkilld.stop.process import ProcessHandle, check_pid_namespace

if TYPE_CHECKING:
    from qkilld.model.unit import UnitFacts

OUTSIDE_TIMEOUT_S = 2.0
LEFT = "a later line of ExecStop= stops the guests of the unit"


class GuestElsewhere(QkilldError):
    """The guest that our own unit started is in another unit, and continues to run."""

    exit_code = ExitCode.SURVIVED

    def __init__(self, guest: OutsideGuest) -> None:
        place = guest.unit or "no unit"
        super().__init__(
            f'the guest of this unit, "{printable(guest.name or "QEMU")}" (process {guest.pid}),'
            f" runs in {printable(place)}, outside of the unit, and was not stopped. See"
            " `qkillctl check-unit`"
        )


class Targets:
    def __init__(self, options: Options) -> None:
        self.finder = ProcessFinder(options, os.environ)
        self._options = options
        self._config: Config | None = None
        self._failures: list[int] = []
        """An exit code for each reason why a guest may still run although it should not."""
        self._has_pidfile = False
        """Whether a pidfile names a guest that this program stops."""
        self._said = ""
        """The reason, already printed, why the last search for substitutes failed."""

    @property
    def user(self) -> bool:
        """Whether our own unit belongs to a user manager."""
        unit = self.finder.unit
        return unit is not None and bool(unit.user)

    @property
    def reason(self) -> str:
        """The reason to record. If the command line gives no reason, it names the unit whose
        ExecStop= runs this program, or this program itself."""
        if self._options.reason is not None:
            return self._options.reason
        if not self.finder.stops_unit:
            return "qkilld-stop"
        unit = self.finder.unit
        return f"ExecStop of {unit.name if unit is not None else 'a unit'}"

    def choose(self) -> list[ProcessHandle]:
        """Return the processes to stop, at least one.

        Raises NoSuchProcess if there is no process to stop, but Failed if a PID namespace of our
        own hides the guests. Also raises GuestElsewhere, NoSuchUnit, InvalidArgs and Failed.
        """
        open_files.raise_limit()  # Each process needs a descriptor.
        if os.getpid() == 1:
            check_pid_namespace()
        try:
            return self._choose()
        except NoSuchProcess:
            check_pid_namespace()
            raise

    def _choose(self) -> list[ProcessHandle]:
        try:
            if (named := self.finder.named()) is not None:
                self._has_pidfile = self._options.pidfile is not None
                return [named]
        except QkilldError as error:
            return self._instead_of_named(error)
        if self._options.all_guests:
            return self._unattended()
        try:
            processes = self.finder.in_unit(self._executables)
        except Failed as error:
            raise self._failed_search(error) from None
        if processes:
            # If systemd reports an exit code, the unit had a main process. With `--pid $MAINPID`,
            # guests are left to later lines even if the unit never had a main process.
            had_main = "EXIT_CODE" in os.environ or self._options.names_one
            if self.finder.in_own_unit and had_main:
                processes = self.left_to_us(processes)
            elif self.finder.in_own_unit:
                self.spare_others()
            if not processes:
                raise NoSuchProcess("the main process is gone")
            return processes
        if (name := self._options.unit) is not None:
            from qkilld.stop.systemd_units import check_unit, on_bus

            on_bus(lambda connection: check_unit(connection, name), user=self.user)
        self.check_elsewhere()
        raise NoSuchProcess("no QEMU runs in the unit")

    def _instead_of_named(self, error: QkilldError) -> list[ProcessHandle]:
        """Return the QEMUs of our own unit to stop, at least one, because the process that is named
        cannot be found. It may have been a shell that ran them, or one of them has the unusable
        pidfile. systemd is about to stop them anyway.

        Raises `error`, or NoSuchProcess if they are left to a later line of ExecStop=.
        """
        is_gone = isinstance(error, NoSuchProcess)
        others = self.substitutes(())
        if not others and is_gone:
            self.check_elsewhere()
        ours = self.left_to_us(others, missing=None if is_gone else error)
        if not ours:
            if is_gone or self._failures or not others:
                raise error
            say(str(error))
            raise NoSuchProcess(LEFT)
        if not is_gone:
            which = "Only the main process" if self._failures else "Therefore, every QEMU"
            say(f"{error}. {which} of the unit is stopped")
        return ours

    def check_elsewhere(self) -> None:
        """Raise GuestElsewhere if the QEMU that our own unit has started runs in another unit.

        Asks systemd only if any QEMU runs outside of the unit.
        """
        if not self.finder.in_own_unit:
            return
        outside = self._outside()
        if not outside:
            return
        from qkilld.stop.systemd_units import guest_of_own_unit, on_bus

        guest = on_bus(lambda connection: guest_of_own_unit(connection, outside), user=self.user)
        if guest is not None:
            raise GuestElsewhere(guest)

    def substitutes(self, excluded_pids: Collection[int]) -> list[ProcessHandle]:
        """Return the QEMU processes of our own unit, except those in `excluded_pids`. Call this if
        the main process of the unit is gone or not a QEMU (for example, a shell).

        Raises what `_failed_search` returns if `excluded_pids` is empty, no QEMU is found, and a
        process cannot be identified.
        """
        if not self.finder.in_own_unit:
            return []
        try:
            processes = self.finder.in_unit(self._executables)
        except Failed as error:
            if (self.finder.unidentified or self.finder.denied) and not excluded_pids:
                raise self._failed_search(error) from None
            if (text := str(error)) != self._said:
                self._said = text
                say(text)
            return []
        for process in processes:
            if process.pid in excluded_pids:
                process.close()
        return [process for process in processes if process.pid not in excluded_pids]

    def codes(self) -> list[int]:
        """Return the exit codes for guests that should have been stopped, but may still run. Print
        which unidentified processes may be such guests.

        The unidentified processes are read again, because the search took place at the start, and
        some may have exited or turn out not to be guests.
        """
        if self.finder.unidentified:
            self.finder.read_unidentified_again(self._executables)
        if not self.finder.unidentified:
            return self._failures
        say(str(self.finder.unknown_identity()))
        if self._leaves_others(self._own_facts()):  # As in _failed_search.
            return self._failures
        return [*self._failures, ExitCode.FAILURE]

    def _failed_search(self, error: Failed) -> QkilldError:
        """Return the error to raise if a search failed. Do not fail if a later line will search
        again, because systemd would not run that line after a failure."""
        if not self._leaves_others(self._own_facts()):
            return error
        say(str(error))
        return NoSuchProcess(LEFT)

    def left_to_us(
        self,
        others: Sequence[ProcessHandle],
        *,
        main_was_qemu: bool = False,
        missing: QkilldError | None = None,
        fails: bool = False,
    ) -> list[ProcessHandle]:
        """Of these QEMU processes of our own unit, return those that are ours to stop, and close
        the handles of the others. Asks systemd.

        Processes are not ours in two cases. If the main process is a QEMU and the unit has
        KillMode=process or none, all other processes outlive the unit. If an option names a
        process, the others are left to a later line of ExecStop= if it is certain that it stops
        them. Otherwise, they may have a line of their own, so our options must not harm them.

        `main_was_qemu`: the main process is known to have been a QEMU, not a shell that ran QEMUs.
        `missing`: why the guest that an option names was not found, although it may be one of
        `others`. `fails`: this line of ExecStop= fails.
        """
        if not others:
            return []
        from qkilld.stop.systemd_units import started_as_qemu

        facts = self._own_facts()
        ours = list(others)
        if facts is None:
            if main_was_qemu or self._has_pidfile:
                say(
                    "another QEMU of the unit is not stopped, because KillMode= cannot be read."
                    " Write + before the path in ExecStop="
                )
                # If an option names a process, do not fail, because after a failure, systemd would
                # skip the next line.
                if not self._options.names_one:
                    self._failures.append(ExitCode.SURVIVED)
                ours = []
        elif facts.kill_mode in ("process", "none") and (
            main_was_qemu or started_as_qemu(facts, self._executables)
        ):
            ours = [other for other in others if other.pid == facts.main_pid]
        if missing is not None and len(ours) < len(others):
            self._failures.append(missing.exit_code)  # Nobody stops the others.
        if self._leaves_others(facts, fails=fails or bool(self._failures)):
            ours = []
        else:
            self._spare_others(facts)
        for other in others:
            if other not in ours:
                other.close()
        return ours

    def spare_others(self) -> None:
        """Prepare to stop guests of our own unit that the command line does not name. Asks systemd
        if an option might harm a guest that has a line of its own."""
        options = self._options
        if options.force or options.powerdown is False or options.spans:
            self._spare_others(self._own_facts())

    def _spare_others(self, facts: UnitFacts | None) -> None:
        from qkilld.stop.systemd_units import is_only_line

        if facts is None or not is_only_line(facts):
            self._options.spare_others(self._configuration.policy_for(None))

    def _own_facts(self) -> UnitFacts | None:
        from qkilld.stop.systemd_units import on_bus, own_facts

        with ignore("asking systemd for the settings of this unit", Exception):
            return on_bus(own_facts, user=self.user)
        return None

    def _leaves_others(self, facts: UnitFacts | None, *, fails: bool = False) -> bool:
        """Return whether the other guests of our own unit are left to a later line of ExecStop=.
        `facts`: the unit's settings, None if unknown. `fails`: this line fails."""
        if facts is None or not (self.finder.in_own_unit and self._options.names_one):
            return False
        from qkilld.stop.systemd_units import later_line_stops

        return later_line_stops(facts, fails=fails)

    def is_in_own_unit(self, pid: int) -> bool:
        """Return False if that is unknown."""
        own = self.finder.unit
        return own is not None and bool(own.name) and procfs.read_unit(pid) == own

    def _outside(self) -> list[OutsideGuest]:
        """Return the QEMU processes in other units, as far as they can be read within
        OUTSIDE_TIMEOUT_S."""
        import threading

        guests: list[OutsideGuest] = []
        globs = self._executables

        def read() -> None:
            for guest in self.finder.outside(globs):
                guests.append(guest)

        reader = threading.Thread(target=read, name="guests", daemon=True)
        try:
            reader.start()
        except RuntimeError as error:  # The system allows no more threads.
            note("starting a thread to look for guests", error)
            read()  # If this blocks, only this program waits.
        else:
            reader.join(OUTSIDE_TIMEOUT_S)
        return list(guests)

    def judge_not_qemu(
        self, pid: int, message: str, others: list[ProcessHandle]
    ) -> tuple[int, list[ProcessHandle]]:
        """Return the exit code for a named process that is not a QEMU, and the processes to stop
        among `others`. The code is 0 if the process may be a shell that runs the `others`. If there
        are no `others`, but the QEMU that our unit has started runs in another unit, print which
        unit that is."""
        self._has_pidfile = False
        if others and _is_uncovered(pid):
            say(f"{message}, and is left to systemd")
            is_main = str(pid) == os.environ.get("MAINPID")
            others = self.left_to_us(others, main_was_qemu=is_main, fails=True)
            return ExitCode.NOT_QEMU, others
        if others:
            if self._options.names_one:
                others = self.left_to_us(others, missing=NotQemu(message))
            else:
                self.spare_others()
            if self._failures:
                say(message)
            return ExitCode.OK, others
        unknown = self.finder.unidentified or self.finder.denied
        own = self.finder.in_own_unit and not unknown
        say(f"{message}{', and its unit has no other QEMU' if own else ''}")
        try:
            self.check_elsewhere()
        except GuestElsewhere as error:
            say(str(error))
        return ExitCode.NOT_QEMU, []

    def _unattended(self) -> list[ProcessHandle]:
        from qkilld.stop.systemd_units import on_bus, unattended

        guests = self.finder.of_manager(self._executables)
        processes = on_bus(lambda connection: unattended(guests, connection), user=self.user)
        if self.finder.unidentified and not processes:
            raise self.finder.unknown_identity()
        if not processes:
            raise NoSuchProcess("every QEMU is stopped by its own unit, or none runs")
        return processes

    @property
    def _configuration(self) -> Config:
        if self._config is None:
            self._config = configuration()
        return self._config

    @property
    def _executables(self) -> tuple[str, ...]:
        return self._configuration.executables


def _is_uncovered(pid: int) -> bool:
    """Return whether the process, judging by its name, is a QEMU that Executables= does not
    cover."""
    with ignore(f"reading the executable of process {pid}", OSError):
        path, _ = procfs.read_executable(pid)
        if "qemu" in path or "kvm" in path:  # The import takes long.
            from qkilld.unitcheck.context import looks_like_qemu

            return looks_like_qemu(path)
    return False
