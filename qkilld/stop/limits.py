"""What the unit's own settings allow the helper. Pure; all times in µs.

What systemd does (systemd.service(5), systemd.kill(5); systemd, src/core/service.c): the timeout of
TimeoutStopSec= begins with the command of ExecStop=. When the command has ended, or its timeout has
passed, KillSignal= is sent, with a fresh timeout, and after that SIGKILL with another one.
RuntimeMaxSec= does not run while a unit is being stopped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qkilld.model.timespan import format_usec
from qkilld.model.words import INFINITY, USEC_PER_SEC

if TYPE_CHECKING:
    from qkilld.model.unit import UnitFacts

FIRST: Final = 10 * USEC_PER_SEC
"""The first extension, sent before anything is known: enough to ask the daemon and be refused."""
STEP: Final = 20 * USEC_PER_SEC
"""No extension goes further; it is renewed every second or two."""
MARGIN: Final = 5 * USEC_PER_SEC
"""What an extension has beyond the job's own deadline, which moves as the guest does."""


@dataclass(frozen=True, slots=True)
class Limits:
    """For a helper that knows nothing of its unit: it stays as long as systemd lets it."""

    stay: int = INFINITY
    """So long after its start the helper leaves by itself: before systemd ends it."""
    warnings: tuple[str, ...] = ()
    """What is wrong with the unit, what may come of it and what mends it. A sentence each, with
    neither a capital at its start nor a stop at its end."""


def limits_of(facts: UnitFacts, own_pid: int) -> Limits:
    """For the ExecStop= process `own_pid` of that unit."""
    stay, warnings = INFINITY, []
    if facts.timeout_stop != INFINITY and (why := _cannot_extend(facts, own_pid)):
        stay = facts.timeout_stop - _margin(facts.timeout_stop)
        warnings.append(
            f"{facts.id} has TimeoutStopSec={format_usec(facts.timeout_stop)}, which qkilld-stop "
            f"cannot extend for a guest that is still writing: {why}"
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
    return Limits(stay, tuple(warnings))


def would_be_killed(facts: UnitFacts, pid: int) -> bool:
    """Whether systemd, once the helper has left, would send SIGKILL to that process of the unit."""
    return (
        facts.sends_sigkill
        and facts.timeout_stop != INFINITY
        and facts.kill_mode != "none"
        and (facts.kill_mode != "process" or pid == facts.main_pid)
    )


def being_stopped(facts: UnitFacts) -> bool:
    """Whether systemd is stopping the unit and waits for a process like the helper."""
    return facts.control_pid != 0 and facts.active_state == "deactivating"


def extension(deadlines: Iterable[int], now: int) -> int:
    """What EXTEND_TIMEOUT_USEC= is to say while jobs with these deadlines run.

    A deadline is when a job takes its next step, so this never leads past what its policy allows.
    """
    longest = max((deadline - now for deadline in deadlines), default=0)
    return min(max(longest, 0), STEP) + MARGIN


def _cannot_extend(facts: UnitFacts, own_pid: int) -> str:
    """Why, and what mends it; "" where it can."""
    if facts.notify_access not in ("exec", "all"):
        return f"NotifyAccess= is {facts.notify_access}. Add NotifyAccess=exec to [Service]"
    if facts.notify_access == "exec" and facts.control_pid != own_pid:
        return (
            "ExecStop= starts a shell around it, and NotifyAccess=exec is for that shell alone. "
            "Have it `exec qkilld-stop`"
        )
    return ""


def _margin(timeout: int) -> int:
    """For the way out."""
    return min(max(timeout // 5, 100_000), 2 * USEC_PER_SEC)
