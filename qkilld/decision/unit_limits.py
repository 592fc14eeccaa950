"""Limits that a unit's settings set for its ExecStop= process. Pure; all times in µs.

systemd (systemd.service(5), systemd.kill(5); src/core/service.c) starts the timeout of
TimeoutStopSec= with the ExecStop= command. When the command has ended or its timeout has passed, it
sends KillSignal= with a fresh timeout, and after that SIGKILL with another one. RuntimeMaxSec= does
not apply while a unit is being stopped.
"""

from __future__ import annotations

from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.timespan import format_usec
from qkilld.model.unit import UnitFacts

FOR_SIGTERM: Final = 5 * USEC_PER_SEC
"""The shortest time (µs) that asking the guest leaves of a timeout that cannot be extended; half of
the timeout if that is longer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults are for an unknown unit: the helper stays as long as systemd lets it."""

    stay: int = INFINITY
    """How long after its start the helper exits by itself, before systemd kills it."""
    ask: int = INFINITY
    """How long after its start asking the guest ends, so that time is left for SIGTERM."""
    force: bool = False
    """systemd would send SIGKILL to the guest's process in the end."""
    extendable: bool = False
    """The unit has a time limit, which the helper may extend."""
    warnings: tuple[str, ...] = ()
    """Problems of the unit, their consequences and fixes, as sentences without an initial capital
    and a full stop."""


def limits_of(facts: UnitFacts, own_pid: int, pid: int) -> Limits:
    """Return the limits of the ExecStop= process `own_pid` of that unit, which stops `pid`."""
    stay, ask, warnings = INFINITY, INFINITY, []
    if facts.timeout_stop != INFINITY and (why := _cannot_extend(facts, own_pid)):
        stay = facts.timeout_stop - _margin(facts.timeout_stop)
        ask = max(0, facts.timeout_stop - max(facts.timeout_stop // 2, FOR_SIGTERM))
        warnings.append(
            f"{facts.id} has TimeoutStopSec={format_usec(facts.timeout_stop)}, which qkilld-stop "
            f"cannot extend for a guest that is still shutting down or writing: {why}"
        )
    if facts.kill_mode == "none":
        warnings.append(
            f"{facts.id} has KillMode=none: systemd forgets a guest that is still there in the "
            "end, and starts another one beside it on the same disks. Leave that line out"
        )
    elif not facts.sends_sigkill:
        warnings.append(
            f"{facts.id} has SendSIGKILL=no: systemd forgets a guest that is stuck, and starts "
            "another one beside it on the same disks. Leave that line out"
        )
    return Limits(
        stay=stay,
        ask=ask,
        force=would_be_killed(facts, pid),
        extendable=stay == INFINITY and facts.timeout_stop != INFINITY,
        warnings=tuple(warnings),
    )


def would_be_killed(facts: UnitFacts, pid: int) -> bool:
    """Return whether systemd would send SIGKILL to that process after the helper has left."""
    return (
        facts.sends_sigkill
        and facts.timeout_stop != INFINITY
        and facts.kill_mode != "none"
        and (facts.kill_mode != "process" or pid == facts.main_pid)
    )


def being_stopped(facts: UnitFacts) -> bool:
    """Return whether systemd is stopping the unit and waits for a process like the helper."""
    return facts.control_pid != 0 and facts.active_state == "deactivating"


def _cannot_extend(facts: UnitFacts, own_pid: int) -> str:
    """Return why the timeout cannot be extended, and how to fix it; "" if it can."""
    if facts.notify_access not in ("exec", "all"):
        return f"NotifyAccess= is {facts.notify_access}. Add NotifyAccess=exec to [Service]"
    if facts.notify_access == "exec" and facts.control_pid != own_pid:
        return (
            "ExecStop= starts a shell around it, and NotifyAccess=exec is for that shell alone. "
            "Have it `exec qkilld-stop`"
        )
    return ""


def _margin(timeout: int) -> int:
    """Return the time that the helper needs to leave."""
    return min(max(timeout // 5, 100_000), 2 * USEC_PER_SEC)
