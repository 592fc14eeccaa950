"""What Terminate would do, told in advance. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from signal import SIGKILL, SIGTERM, Signals

from qkilld.judgement.ladder import Standing, decide, kill_due
from qkilld.judgement.verdict import Assessment, blind_to, standstill
from qkilld.model.guest import Identity
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, Flag, Phase


@dataclass(frozen=True, slots=True)
class PlannedRung:
    phase: Phase
    signal: Signals
    after: int
    """µs after the start; for SIGKILL the earliest moment, were nothing to change."""


@dataclass(frozen=True, slots=True)
class Plan:
    rungs: tuple[PlannedRung, ...]
    gives_up_after: int
    """µs after the start; INFINITY for never."""
    warnings: tuple[str, ...]


def make_plan(
    identity: Identity, flags: Flag, policy: Policy, evidence: Assessment | None, now: int
) -> Plan:
    """`now`: CLOCK_MONOTONIC, µs. `evidence` is what was seen of the process just now."""
    if Flag.NOWAIT in flags:
        number = SIGKILL if Flag.FORCE in flags else SIGTERM
        phase = Phase.KILL if Flag.FORCE in flags else Phase.TERMINATE
        return Plan((PlannedRung(phase, number, 0),), 0, _warnings(identity, flags, evidence))
    standing = Standing(flags, policy, term_at=now, assessment=evidence)
    rungs = [PlannedRung(Phase.TERMINATE, SIGTERM, 0)]
    last = kill_due(standing) if standing.by_evidence else decide(standing, now).deadline
    if Flag.FORCE in flags:
        if last != INFINITY:
            rungs.append(PlannedRung(Phase.KILL, SIGKILL, last - now))
            last = min(last + policy.reap, INFINITY)
    elif standing.by_evidence:
        last = min(last + policy.reap, INFINITY)
    gives_up = INFINITY if last == INFINITY else last - now
    return Plan(tuple(rungs), gives_up, _warnings(identity, flags, evidence))


def _warnings(identity: Identity, flags: Flag, evidence: Assessment | None) -> tuple[str, ...]:
    found = []
    if Flag.FORCE not in flags:
        found.append("without FORCE no SIGKILL is sent: a guest that is stuck stays")
    if Flag.FIXED in flags:
        found.append("FIXED goes by the clock: a guest that is still flushing loses data")
    if Flag.FORCE in flags and Flag.NOWAIT in flags:
        found.append("SIGKILL at once: what QEMU has not written is lost")
    if identity.executable_deleted:
        found.append("its executable was replaced by an upgrade; it is still taken for a QEMU")
    if evidence is None:
        return (*found, "nothing could be seen of it: that counts as I/O outstanding")
    if held := standstill(evidence.last):
        found.append(f"{held}: SIGTERM takes effect only when it is let go")
    if unseen := blind_to(evidence.last):
        found.append(f"not to be seen: {', '.join(unseen)}; that counts as I/O outstanding")
    if evidence.pending:
        found.append(f"about {evidence.pending} bytes are not yet where they belong")
    return tuple(found)
