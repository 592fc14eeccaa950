"""Predict what a running job does next, and explain its verdict. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qkilld.decision.ladder import JobFacts, kill_due, should_yank
from qkilld.model.constants import INFINITY, Flag, GuestAsked, NextRung, Phase
from qkilld.model.dataclass import dataclass
from qkilld.model.job_status import BEFORE_SIGNALS

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

MAX_REASONS: Final = 8


@dataclass(frozen=True, slots=True)
class Outlook:
    """The next rung of a job, if nothing changes."""

    rung: NextRung
    standstill: int = 0
    """The rung follows after this time (µs) without progress; 0 if progress does not delay the
    rung."""


def outlook(job: ObservedJob) -> Outlook:
    """Return what the job does next if nothing changes."""
    if job.phase is Phase.DONE:
        return Outlook(NextRung.NONE)
    if job.phase in BEFORE_SIGNALS:
        return _before_signals(job)
    facts = job.facts
    if facts.kill_at is not None:
        return Outlook(NextRung.GIVE_UP)
    rung = NextRung.GIVE_UP
    if Flag.FORCE in job.flags:
        rung = NextRung.YANK if should_yank(facts, job.deadline) else NextRung.KILL
    return Outlook(rung, _standstill(facts, job.deadline))


def reasons(job: ObservedJob) -> tuple[str, ...]:
    """Return the reasons for the verdict, the most important first."""
    if job.assessment is not None and job.phase not in BEFORE_SIGNALS:
        return job.assessment.reasons[:MAX_REASONS]
    return job.history[-1].reasons[:MAX_REASONS] if job.history else ()


def _before_signals(job: ObservedJob) -> Outlook:
    asks_alone = replace(job.request, flags=job.flags).asks_alone
    after = NextRung.GIVE_UP if asks_alone else NextRung.TERMINATE
    if job.phase is Phase.QUIT:
        return Outlook(after)
    if job.guest_asked is GuestAsked.NOT_ASKED:
        return Outlook(NextRung.ASK)
    latest = min(job.started + min(job.request.ask_at_most, job.policy.max), INFINITY)
    return Outlook(after, job.policy.powerdown if job.deadline < latest else 0)


def _standstill(facts: JobFacts, deadline: int) -> int:
    """Return how long (µs) the process can go without progress before the deadline comes. Return 0
    if the deadline depends only on GraceSec=, MaxSec= or an extension."""
    evidence, policy = facts.assessment, facts.policy
    if evidence is None or facts.term_at is None or not facts.by_evidence:
        return 0
    if deadline == INFINITY:
        return 0  # There is no deadline that progress could delay.
    reap = 0 if Flag.FORCE in facts.flags else policy.reap
    # Compute the deadline that progress alone would set, to see whether it is the job's deadline.
    promise = replace(facts.promise, due=0)
    bare = replace(facts, promise=promise, policy=replace(policy, grace=0))
    due = kill_due(bare)
    start = facts.term_at if facts.started is None else facts.started
    if due + reap != deadline or due >= start + policy.max:
        return 0
    span = policy.stall
    if evidence.may_be_outstanding:
        without = replace(bare, policy=replace(bare.policy, storage_stall=0))
        span = policy.storage_stall if kill_due(without) < due else policy.stall
    return span + reap
