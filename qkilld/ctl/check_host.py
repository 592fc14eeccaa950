"""The command check-host: what qkilld-guests.service would change on this host."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from qkilld.adapters import procfs
from qkilld.adapters.ancestors import service_of
from qkilld.bus.systemd import Systemd
from qkilld.ctl.process_stats import executable as claimed_executable
from qkilld.ctl.session import Session
from qkilld.ctl.unit_context import config_of, find_keepers, guard_of
from qkilld.debug_log import ignore
from qkilld.model.constants import INFINITY, ExitCode
from qkilld.model.errors import QkilldError
from qkilld.model.policy import Config, is_qemu
from qkilld.model.text import printable
from qkilld.model.unit import UnitFacts, is_user_manager
from qkilld.unitcheck.comparison import coverage_line
from qkilld.unitcheck.context import GUESTS_SERVICE, looks_like_qemu
from qkilld.unitcheck.host_shutdown import (
    HostGuest,
    HostReport,
    StoppedBy,
    predict_stop,
    shutdown_order,
)
from qkilld.unitcheck.keepers import (
    KEEPERS,
    PROGRAMS,
    GuestKeeper,
    project_of,
)


async def check_host(session: Session) -> int:
    """Print the report. Return 0 if it is certain that systemd's own signals stop no guest,
    otherwise ExitCode.UNSAFE."""
    report = await _HostCheck(session, await config_of(session)).report()
    uncovered = (StoppedBy.SYSTEMD, StoppedBy.UNCOVERED)
    code = ExitCode.OK
    if not report.is_complete or any(each.stopped_by in uncovered for each in report.guests):
        code = ExitCode.UNSAFE
    if not report.is_complete:
        session.output.error(
            "you may not see the processes of other users, so guests and keepers may be missing:"
            " run this as root"
        )
    if session.json:
        session.output.json(as_json(report, code))
    else:
        _show(session, report)
    return code


class _HostCheck:
    def __init__(self, session: Session, config: Config) -> None:
        self._systemd = Systemd(session.connection)
        self._config = config
        self._units: dict[str, UnitFacts | None] = {}
        self._keepers: dict[str, GuestKeeper] = {}
        """The keepers (units that shut down guests) found so far, by unit name."""

    async def report(self) -> HostReport:
        guests = []
        names = [name for name in KEEPERS if name.endswith(".service")]
        pids = procfs.pids()
        # Process 1 is missing if /proc hides the processes of other users (hidepid=).
        is_complete = 1 in pids
        for pid in pids:
            with ignore(f"looking at process {pid}", OSError):
                try:
                    executable = procfs.read_executable(pid)[0]
                except PermissionError:
                    is_complete = False
                    executable = claimed_executable(pid)
                if PurePosixPath(executable).name in PROGRAMS and (runs_in := service_of(pid)):
                    names.append(runs_in)
                covered = is_qemu(executable, self._config.executables)
                if covered or looks_like_qemu(executable):
                    guests.append(await self._guest(pid, executable, is_covered=covered))
        keepers = dict(self._keepers)
        for name in dict.fromkeys(names):
            facts = await self._unit(name)
            if facts is None or facts.active_state != "active":
                continue
            if project := project_of(facts):
                keepers[name] = GuestKeeper(name, project, facts.timeout_stop)
        service = await self._unit(GUESTS_SERVICE)
        is_active = service is not None and service.active_state == "active"
        return HostReport(
            is_active,
            tuple(keepers.values()),
            tuple(guests),
            shutdown_order(guests),
            is_complete=is_complete,
        )

    async def _guest(self, pid: int, executable: str, *, is_covered: bool) -> HostGuest:
        unit = procfs.read_unit(pid)
        name = "" if unit is None else unit.system
        facts = await self._unit(name) if name else None
        keepers = await find_keepers(self._systemd, facts, [pid])
        self._keepers |= {keeper.unit: keeper for keeper in keepers}
        guarded = False
        if facts is not None and facts.is_scope:
            guard = await self._unit(guard_of(facts.id))
            guarded = guard is not None and guard.active_state == "active"
        stopped_by = predict_stop(
            is_covered=is_covered,
            cares_for_guests=facts is not None and facts.cares_for_guests,
            is_guarded=guarded,
            keepers=[keeper.unit for keeper in keepers],
            is_before=facts is not None and _is_before(facts),
            has_unit=bool(name),
        )
        line = "" if is_covered else coverage_line(self._config.executables, executable)
        guest = procfs.read_names(pid)[0] or ""
        units = tuple(keeper.unit for keeper in keepers)
        return HostGuest(pid, guest, name, stopped_by, units, line)

    async def _unit(self, name: str) -> UnitFacts | None:
        """Return the settings of a unit; None if systemd does not know it."""
        if name not in self._units:
            self._units[name] = None
            with ignore(f"asking systemd for {name}", QkilldError):
                self._units[name] = await self._systemd.unit(name)
        return self._units[name]


def _is_before(facts: UnitFacts) -> bool:
    # Our drop-ins give scopes and user managers Before=qkilld-guests.service. Assume this ordering
    # even if it is missing, because systemd has perhaps not read the drop-ins yet.
    return facts.is_scope or is_user_manager(facts.id) or GUESTS_SERVICE in facts.before


def _show(session: Session, report: HostReport) -> None:
    output = session.output
    state = "is active" if report.is_active else "is not active"
    output.line(f"{GUESTS_SERVICE} {state}.")
    if not report.guests:
        output.line("No QEMU runs on this host." if report.is_complete else "No QEMU can be seen.")
    for keeper in report.keepers:
        output.line(f"keeper  {keeper.unit} ({keeper.project}), which shuts its own guests down")
    for guest in report.guests:
        output.line(f"guest   {printable(str(guest), 1000)}")
    for number, group in enumerate(report.order, 1):
        output.line(f"stop {number}  {printable(', '.join(group), 1000)}")


def as_json(report: HostReport, code: int) -> dict[str, Any]:
    return {
        "active": report.is_active,
        "complete": report.is_complete,
        "keepers": [
            {
                "unit": each.unit,
                "project": each.project,
                "timeout_usec": None if each.timeout == INFINITY else each.timeout,
            }
            for each in report.keepers
        ],
        "guests": [
            {
                "pid": each.pid,
                "name": each.name,
                "unit": each.unit,
                "stopped_by": each.stopped_by.value,
                "keepers": list(each.keepers),
                "line": each.line,
            }
            for each in report.guests
        ],
        "order": [list(group) for group in report.order],
        "exit_code": int(code),
    }
