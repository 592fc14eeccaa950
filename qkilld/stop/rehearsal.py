"""--dry-run: print what would be done."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from typing import Any

from qkilld import log_setup
from qkilld.debug_log import note
from qkilld.decision.plan import PlannedRung
from qkilld.decision.unit_limits import Limits, limits_of
from qkilld.engine.service import Option
from qkilld.model.constants import INFINITY, ExitCode, Flag
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import NoSuchProcess, NotQemu
from qkilld.model.job_status import known, rungs_as_json
from qkilld.model.policy import JOB_SPANS
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.stop.fallback import Fallback, LocalCaller
from qkilld.stop.limits import ASK_ALL
from qkilld.stop.log import Log
from qkilld.stop.options import Options
from qkilld.stop.process import ProcessHandle
from qkilld.stop.systemd_units import limiting_units, on_bus
from qkilld.stop.targets import Targets


@dataclass(frozen=True, slots=True)
class GuestPlan:
    pid: int
    name: str
    unit: str
    force: bool
    rungs: tuple[PlannedRung, ...]
    gives_up_usec: int | None
    leaves_usec: int | None
    """The time (µs after the start) at which qkilld-stop would exit, so that systemd does not kill
    it; None for never."""
    ways: tuple[str, ...]
    """How the guest can be asked to shut down, and why that may fail."""
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        name = f" ({self.name})" if self.name else ""
        lines = [
            f"would stop process {self.pid}{name}",
            f"  force     {'yes' if self.force else 'no: no SIGKILL'}",
        ]
        for rung in self.rungs:
            after = f"after {format_usec(rung.after)}, or later if it makes progress"
            lines.append(f"  {rung.action:<9} {after if rung.after else 'now'}")
        for title, usec in (("gives up", self.gives_up_usec), ("leaves", self.leaves_usec)):
            if usec is not None:
                lines.append(f"  {title:<9} after {format_usec(usec)}")
        lines += [f"  asking    {printable(text, 1000)}" for text in self.ways]
        return lines + [f"  warning   {printable(text, 1000)}" for text in self.warnings]

    def as_json(self) -> dict[str, Any]:
        rungs = rungs_as_json((rung.phase.value, rung.action, rung.after) for rung in self.rungs)
        return dataclasses.asdict(self) | {"rungs": rungs}


def rehearse(options: Options) -> int:
    """Print the plans, and return the exit code. Raises QkilldError if there is nothing to stop."""
    plans = _plans(options)
    if options.json:
        print(json.dumps([plan.as_json() for plan in plans], indent=2))
    else:
        print("\n".join(line for plan in plans for line in plan.lines()))
    return ExitCode.OK


def _plans(options: Options) -> list[GuestPlan]:
    log_setup.silence()
    targets = Targets(options)
    processes = targets.choose()
    plans: list[GuestPlan] = []
    for process in processes:
        try:
            plans.append(_plan_of(options, process, targets))
        except NoSuchProcess as error:
            note("planning a stop", error)
        except NotQemu:
            others = targets.substitutes({process.pid for process in processes})
            plans += [_plan_of(options, other, targets) for other in others]
            if not plans:
                raise
    if not plans:
        raise NoSuchProcess("the guest has just exited")
    return plans


def _plan_of(options: Options, process: ProcessHandle, targets: Targets) -> GuestPlan:
    """Raises QkilldError."""
    pid, limits = process.pid, Limits()
    units = on_bus(lambda connection: limiting_units(connection, [pid]), user=targets.user)
    if units is not None:
        own, guest_units = units
        limits = limits_of(own, os.getpid(), pid, guest_units.get(pid))
    return asyncio.run(_plan(options, process, limits))


async def _plan(options: Options, process: ProcessHandle, limits: Limits) -> GuestPlan:
    flags = Flag(0) if options.powerdown is False else Flag.POWERDOWN
    if limits.force if options.force is None else options.force:
        flags |= Flag.FORCE
    bus_options: dict[str, Option] = {
        span.bus_option: Option("t", options.spans[span.field])
        for span in JOB_SPANS
        if span.field in options.spans
    }
    if options.powerdown is None:
        bus_options["powerdown-as-configured"] = Option("b", True)
    ask = min(limits.ask, ASK_ALL) if options.all_guests else limits.ask
    if ask != INFINITY:
        bus_options["powerdown-max-usec"] = Option("t", ask)
    fallback = Fallback(Log())
    try:
        guest, plan = await fallback.service.plan(process.pid, flags, bus_options, LocalCaller())
    finally:
        await fallback.close()
    return GuestPlan(
        pid=guest.identity.pid,
        name=guest.label.shown_name,
        unit=guest.label.unit_name,
        force=Flag.FORCE in flags,
        rungs=plan.rungs,
        gives_up_usec=known(plan.gives_up_after),
        leaves_usec=known(limits.stay),
        ways=plan.ways,
        warnings=(*limits.warnings, *plan.warnings),
    )
