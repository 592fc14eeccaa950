"""Describe in advance the steps of a Terminate call. Pure."""

from __future__ import annotations

from signal import SIGCONT, SIGKILL, SIGTERM
from typing import Final

from qkilld.decision.ladder import JobFacts, decide, kill_due
from qkilld.decision.powerdown import obstacle_to_asking
from qkilld.decision.verdict import Assessment, can_be_continued, standstill
from qkilld.decision.waits import blind_to
from qkilld.model.constants import INFINITY, Flag, Phase
from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Identity
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import Request
from qkilld.model.policy import Policy

NOT_LISTENING: Final = (
    "a guest that cannot be asked, or that does not listen, gets SIGTERM within seconds, and all"
    " that follows comes sooner, too"
)


@dataclass(frozen=True, slots=True)
class PlannedRung:
    phase: Phase
    action: str
    """The name of a signal, or "ask"."""
    after: int
    """The earliest time of this step if nothing changes, in µs after the start."""


@dataclass(frozen=True, slots=True)
class Plan:
    rungs: tuple[PlannedRung, ...]
    gives_up_after: int
    """When the job gives up, in µs after the start; INFINITY for never, 0 with NOWAIT."""
    warnings: tuple[str, ...]
    ways: tuple[str, ...] = ()
    """With POWERDOWN: how the guest can be asked, and what prevents it."""


def make_plan(
    identity: Identity,
    request: Request,
    policy: Policy,
    evidence: Assessment | None,
    now: int,
    *,
    may_be_asked: bool = True,
) -> Plan:
    """`now` is CLOCK_MONOTONIC in µs; `evidence` is from samples taken just now. `may_be_asked` is
    False if it is certain that the guest cannot be asked to shut down."""
    flags = request.flags
    warnings = _warnings(identity, flags, evidence)
    ask: tuple[PlannedRung, ...] = (PlannedRung(Phase.POWERDOWN, "ask", 0),)
    if Flag.POWERDOWN in flags and evidence and (obstacle := obstacle_to_asking(evidence.last)):
        if can_be_continued(evidence.last) and GuestOrder.RESUME in request.help:
            ask = (PlannedRung(Phase.POWERDOWN, SIGCONT.name, 0), *ask)
        else:
            ask, warnings = (), (*warnings, obstacle)
    if Flag.NOWAIT in flags:
        first = PlannedRung(Phase.TERMINATE, SIGTERM.name, 0)
        if Flag.FORCE in flags:
            first = PlannedRung(Phase.KILL, SIGKILL.name, 0)
        return Plan(ask if Flag.POWERDOWN in flags else (first,), 0, warnings)
    asking = Flag.POWERDOWN in flags and may_be_asked and bool(ask)
    # Assume a guest that listens but does not react. A guest that shuts down gets more time.
    asks_for = min(policy.powerdown, request.ask_at_most, policy.max) if asking else 0
    if Flag.POWERDOWN in flags and request.powerdown_only:
        return Plan(ask if asking else (), asks_for, warnings)
    if asking:
        warnings = (*warnings, NOT_LISTENING)
    term_at = min(now + asks_for, INFINITY)
    facts = JobFacts(flags=flags, policy=policy, started=now, term_at=term_at, assessment=evidence)
    rungs = list(ask) if asking else []
    rungs.append(PlannedRung(Phase.TERMINATE, SIGTERM.name, term_at - now))
    last = kill_due(facts) if facts.by_evidence else decide(facts, now).deadline
    if Flag.FORCE in flags:
        if last != INFINITY:
            rungs.append(PlannedRung(Phase.KILL, SIGKILL.name, last - now))
            last = min(last + policy.reap, INFINITY)
    elif facts.by_evidence:
        last = min(last + policy.reap, INFINITY)
    gives_up = INFINITY if last == INFINITY else last - now
    return Plan(tuple(rungs), gives_up, warnings)


def _warnings(identity: Identity, flags: Flag, evidence: Assessment | None) -> tuple[str, ...]:
    warnings = []
    if Flag.FORCE not in flags:
        warnings.append("without FORCE no SIGKILL is sent: a guest that is stuck remains")
    if Flag.FIXED in flags:
        warnings.append("FIXED ignores evidence: a guest that is still flushing loses data")
    if Flag.FORCE in flags and Flag.NOWAIT in flags:
        warnings.append("SIGKILL at once: what QEMU has not written is lost")
    if identity.executable_deleted:
        warnings.append("its executable was replaced by an upgrade; it still counts as QEMU")
    if evidence is None:
        return (*warnings, "no evidence could be read, which counts as outstanding I/O")
    if obstacle := standstill(evidence.last):
        warnings.append(f"{obstacle}: SIGTERM takes effect only when it runs again")
    if sources := blind_to(evidence.last):
        warnings.append(f"cannot be read: {', '.join(sources)}; this counts as outstanding I/O")
    if evidence.pending:
        warnings.append(f"about {evidence.pending} bytes are not written yet")
    return tuple(warnings)
