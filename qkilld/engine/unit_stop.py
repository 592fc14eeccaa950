"""Apply a unit's settings to the jobs that its ExecStop= process requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from qkilld.debug_log import ignore
from qkilld.decision.unit_limits import Limits, being_stopped, limits_of
from qkilld.engine.job import Job
from qkilld.engine.service import Service
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.errors import QkilldError
from qkilld.model.guest import Unit
from qkilld.model.job import Request
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.unit import UnitFacts


class ControlProcess(NamedTuple):
    """The ExecStop= process of a unit."""

    unit: Unit
    ran_for: int
    """µs since the start of the process."""


class UnitLimits(NamedTuple):
    """The limits of a unit, or the reason why they are unknown."""

    name: str
    limits: Limits | None
    why: str = ""


class UnitStops:
    def __init__(
        self,
        service: Service,
        describe: Callable[[int], ControlProcess | None],
        *,
        user: bool,
    ) -> None:
        """`describe` returns the ControlProcess of a process id, or None if it is unreadable.
        `user`: whether qkilld runs in a user manager."""
        self._service = service
        self._describe = describe
        self._user = user
        self._tasks: set[asyncio.Task[None]] = set()

    def keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def reason(self, pid: int) -> str:
        """Return "ExecStop of UNIT" for the unit whose ExecStop= process is `pid`; "" if
        unknown."""
        process = self._describe(pid)
        return f"ExecStop of {process.unit.name}" if process and process.unit.name else ""

    async def limit(self, jobs: Sequence[Job], pid: int, uid: int, *, force: bool) -> UnitLimits:
        """Make the jobs obey the settings of the unit whose ExecStop= process is `pid`. `uid`: the
        user of this process.

        With `force`, a job gets FORCE on two conditions: systemd would also send SIGKILL to its
        guest, and the caller is root or owns the guest's process. After the jobs were saved, return
        the limits that apply to all of them. In these limits, `force` says whether systemd would
        send SIGKILL to all guests. It does not say whether the jobs have FORCE.
        """
        name, facts, why = await self._facts(pid)
        if facts is None:
            return UnitLimits(name, None, why)
        process = self._describe(pid)
        units: dict[str, UnitFacts | None] = {facts.id: facts}
        every: list[Limits] = []
        for job in jobs:
            guest_pid = job.guest.identity.pid
            limits = limits_of(facts, pid, guest_pid, await self._unit_of(guest_pid, units))
            every.append(limits)
            # polkit has allowed other callers to send SIGTERM, but not SIGKILL.
            may_force = uid in (0, job.guest.identity.uid)
            if job.running:
                self._join(job, limits, process, uid, force and may_force)
        await self._service.keep(*jobs)
        forced = all(limits.force for limits in every)
        return UnitLimits(facts.id, replace(every[0], force=forced))

    async def _unit_of(self, pid: int, known: dict[str, UnitFacts | None]) -> UnitFacts | None:
        """Return the unit of a guest; None if unknown. `known`: the units that were read so far, by
        name."""
        process, units = self._describe(pid), self._service.units
        if process is None or units is None or bool(process.unit.user) is not self._user:
            return None
        name = process.unit.name
        if name not in known:
            known[name] = None
            with ignore(f"asking systemd for {name}", QkilldError):
                known[name] = await units.unit(name)
        return known[name]

    def _join(
        self, job: Job, limits: Limits, process: ControlProcess | None, uid: int, force: bool
    ) -> None:
        if Flag.NOWAIT in job.flags:
            return  # The job ends right after one signal or request, so no limit matters.
        flags = Flag.FORCE if limits.force and force else Flag(0)
        ask = INFINITY
        if limits.ask != INFINITY and process is not None:
            # The unit's limit counts from the start of the ExecStop= process, but `ask_at_most`
            # counts from the start of the job, which is later.
            ask = max(0, limits.ask - max(0, process.ran_for - job.elapsed))
        if not flags and ask == INFINITY:
            return
        request = Request(
            flags | job.request.flags & Flag.POWERDOWN,
            {},
            job.request.reason,
            uid,
            powerdown_only=job.request.powerdown_only,
            ask_at_most=ask,
        )
        # `join` ends the job if the process has changed.
        with ignore("joining a job for its unit", QkilldError):
            job.join(request)

    async def _facts(self, pid: int) -> tuple[str, UnitFacts | None, str]:
        """Return the unit's name, its settings, and the reason if they are unknown."""
        units = self._service.units
        if units is None:
            return "", None, "systemd cannot be asked without a message bus"
        process = self._describe(pid)
        if process is None:
            return "", None, "the unit of the caller cannot be read"
        unit = process.unit
        if bool(unit.user) is not self._user:
            return "", None, "it is a unit of another manager of systemd"
        name = unit.user if self._user else unit.system
        try:
            facts = await units.unit(name)
        except QkilldError as error:
            return name, None, f"systemd says: {error}"
        if not being_stopped(facts):
            return name, None, f"systemd is not stopping {facts.id}"
        return name, facts, ""
