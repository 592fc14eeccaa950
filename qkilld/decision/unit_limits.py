"""Compute the limits that a unit's settings set for its ExecStop= process. Pure. All times are in
µs.

systemd (systemd.service(5), systemd.kill(5); src/core/service.c) applies TimeoutStopSec= three
times: to the ExecStop= command, then to the exit after KillSignal=, then to the exit after SIGKILL.
RuntimeMaxSec= does not apply while a unit is being stopped, so it is not a limit here.
"""

from __future__ import annotations

from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.timespan import format_usec
from qkilld.model.unit import UnitFacts

FOR_SIGTERM: Final = 5 * USEC_PER_SEC
"""If a timeout cannot be extended, its last part is reserved for SIGTERM: the guest is not asked
during this part. This part is half of the timeout, but at least this long (µs)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the ExecStop= helper. The defaults are for an unknown unit: the helper runs as
    long as systemd lets it."""

    stay: int = INFINITY
    """The helper must exit within this time after its start, or systemd would soon kill it."""
    ask: int = INFINITY
    """The helper stops asking the guest this long after its start, to leave time for SIGTERM."""
    force: bool = False
    """Whether systemd would send SIGKILL to the guest's process at the end of this stop."""
    extendable: bool = False
    """Whether the unit has a time limit that the helper may extend."""
    warnings: tuple[str, ...] = ()
    """A text for each problem of the unit, with the consequence and the fix. Texts have no initial
    capital and no final full stop."""


def limits_of(facts: UnitFacts, own_pid: int, pid: int, guest_unit: UnitFacts | None) -> Limits:
    """Return the limits of process `own_pid`, which is to stop process `pid`, and runs as ExecStop=
    of the unit with these `facts`. `guest_unit`: the unit of `pid`, such as the scope that a
    qkilld-scope@.service guards; None if unknown."""
    if pid == facts.main_pid:
        guest_unit = facts  # systemd kills the main process whatever its control group is.
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
            f"{facts.id} has KillMode=none: after the stop, systemd forgets a guest that still "
            "runs, and can start another one on the same disks. Remove that line"
        )
    elif not facts.sends_sigkill:
        warnings.append(
            f"{facts.id} has SendSIGKILL=no: systemd forgets a guest that is stuck, and can "
            "start another one on the same disks. Remove that line"
        )
    return Limits(
        stay=stay,
        ask=ask,
        force=guest_unit is not None
        and (guest_unit.id == facts.id or _is_stopping(guest_unit))
        and would_be_killed(guest_unit, pid),
        extendable=stay == INFINITY and facts.timeout_stop != INFINITY,
        warnings=tuple(warnings),
    )


def would_be_killed(facts: UnitFacts, pid: int) -> bool:
    """Return whether systemd would send SIGKILL to process `pid` when it stops the unit in which
    `pid` runs."""
    return (
        facts.sends_sigkill
        and facts.timeout_stop != INFINITY
        and facts.kill_mode != "none"
        and (facts.kill_mode != "process" or pid == facts.main_pid)
    )


def _is_stopping(facts: UnitFacts) -> bool:
    # If an active unit has a job, this can only be a stop or restart, which waits for another
    # unit's ExecStop=.
    return facts.active_state == "deactivating" or facts.job != 0


def being_stopped(facts: UnitFacts) -> bool:
    """Return whether systemd is stopping the unit and waits for a control process, such as the
    helper."""
    return facts.control_pid != 0 and facts.active_state == "deactivating"


def _cannot_extend(facts: UnitFacts, own_pid: int) -> str:
    """Return why the timeout cannot be extended, and how to fix it; "" if it can."""
    if facts.notify_access not in ("exec", "all"):
        return f"NotifyAccess= is {facts.notify_access}. Add NotifyAccess=exec to [Service]"
    if facts.notify_access == "exec" and facts.control_pid != own_pid:
        return (
            "ExecStop= starts a shell that starts qkilld-stop, and NotifyAccess=exec is for the "
            "shell alone. Write `exec qkilld-stop` in that line"
        )
    return ""


def _margin(timeout: int) -> int:
    """Return how long (µs) before the timeout the helper must exit."""
    return min(max(timeout // 5, 100_000), 2 * USEC_PER_SEC)
