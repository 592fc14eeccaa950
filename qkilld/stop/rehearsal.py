"""--dry-run: what would be done, told and not done."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkilld.engine.service import Option
from qkilld.model.errors import NotQemu
from qkilld.model.jobview import known
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.words import INFINITY, ExitCode, Flag
from qkilld.stop.caller import OwnUser
from qkilld.stop.limits import limits_of

if TYPE_CHECKING:
    from qkilld.model.unit import UnitFacts
    from qkilld.stop.stopping import Stopping
    from qkilld.stop.target import Target


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What would be done to one process."""

    pid: int
    name: str
    unit: str
    force: bool
    rungs: tuple[tuple[str, int], ...]
    """(signal, µs after the start)."""
    gives_up_usec: int | None
    leaves_usec: int | None
    """After so long qkilld-stop leaves, before systemd ends it; None for never."""
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        name = f" ({self.name})" if self.name else ""
        lines = [
            f"would stop process {self.pid}{name}",
            f"  force     {'yes' if self.force else 'no: it gets no SIGKILL'}",
        ]
        for signal, after in self.rungs:
            when = f"after {format_usec(after)}, or later if it makes progress" if after else "now"
            lines.append(f"  {signal:<9} {when}")
        for title, usec in (("gives up", self.gives_up_usec), ("leaves", self.leaves_usec)):
            if usec is not None:
                lines.append(f"  {title:<9} after {format_usec(usec)}")
        return lines + [f"  warning   {printable(text, 1000)}" for text in self.warnings]


async def rehearse(stopping: Stopping, *, as_json: bool) -> int:
    """Print it; the exit code. Raises what Stopping.run raises."""
    facts = await stopping.facts()
    found: list[Rehearsed] = []
    for target in await stopping.targets():
        try:
            found.append(await _rehearsed(stopping, target, facts))
        except NotQemu:
            found += [await _rehearsed(stopping, one, facts) for one in stopping.instead()]
            if not found:
                raise
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        print("\n".join(line for one in found for line in one.lines()))
    return ExitCode.OK


async def _rehearsed(stopping: Stopping, target: Target, facts: UnitFacts | None) -> Rehearsed:
    force = stopping.forced(target.pid)
    options = {name: Option("t", usec) for name, usec in stopping.options.spans.items()}
    guest, plan = await stopping.engine().service.plan(
        target.pid, Flag.FORCE if force else Flag(0), options, OwnUser()
    )
    limits = limits_of(facts, os.getpid()) if facts is not None else None
    return Rehearsed(
        guest.identity.pid,
        guest.label.name,
        guest.label.unit.name,
        force,
        tuple((rung.signal.name, rung.after) for rung in plan.rungs),
        known(plan.gives_up_after),
        None if limits is None or limits.stay == INFINITY else limits.stay,
        (*(limits.warnings if limits else ()), *plan.warnings),
    )
