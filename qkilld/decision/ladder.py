"""The ladder: choose the next step of a job. SIGKILL is decided here.

Pure: the time is an argument, and no state is kept. Times are CLOCK_MONOTONIC in µs.

A job that is held sends no signals and does not give up. Extend delays SIGKILL. With FIXED, only
time decides. Otherwise, these rules apply between SIGTERM and SIGKILL:

- No SIGKILL is sent without FORCE, or within the grace after SIGTERM.
- `stall` and `storage_stall` count from the last progress, or from SIGTERM, SIGCONT or the cut-off
  of storage if that is later. If SIGKILL was due, but a hold, an extension or a long grace delayed
  it, and the process then begins to wait or stops waiting, they count from this change.
- While the process waits for something, no SIGKILL is sent within `storage_stall`. If evidence is
  missing, the process counts as waiting. A wait that begins later, and doubtful movement, start
  `storage_stall` again.
- While the process waits for nothing, no SIGKILL is sent within `stall`. The end of a wait starts
  `stall` again. So does unreadable evidence, because it may hide a wait.
- Waits and doubts that begin more than DOUBT times `storage_stall` later start nothing again, so a
  process that waits again and again without progress cannot delay SIGKILL forever.
- Only time with samples is counted, because a gap without samples does not prove that nothing
  moved.
- After `max`, SIGKILL is sent whatever the evidence shows. But if SIGTERM was late, because the
  guest was asked first or the job was held, SIGKILL still waits for the grace after SIGTERM, or for
  half of `max` if that is shorter.
- If SIGKILL is due because storage does not move, this storage is first cut off if possible. The
  waiting times then start again, because QEMU may have to finish another disk.
- A process that SIGSTOP has stopped gets SIGCONT, and the waiting times start again.
- Right before SIGKILL, a last sample is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Final

from qkilld.decision.verdict import Assessment, can_be_continued
from qkilld.decision.waits import tells_nothing
from qkilld.model.constants import INFINITY, USEC_PER_SEC, Flag
from qkilld.model.dataclass import dataclass
from qkilld.model.job import UNCONTROLLED, Control
from qkilld.model.policy import Policy

FIXED_POLICY: Final = Policy(grace=10 * USEC_PER_SEC, reap=5 * USEC_PER_SEC, max=INFINITY)
"""The times of libvirt's virProcessKillPainfully of 2012: SIGKILL after 10 s if forced, and 15 s in
total."""
FRESH: Final = 200_000
"""SIGKILL is sent only if the last sample is at most this old (µs)."""
LATE: Final = 1_000_000
"""This limit (µs) replaces FRESH for a sample that was taken when SIGKILL was already due. On a
busy host, all samples are late, so FRESH alone would never allow SIGKILL."""
GRID: Final = 100_000
"""Regular samples are taken at multiples of this (µs), so that jobs are sampled at the same time,
and share readings of the host."""
PER_JOB: Final = 2_000
"""The interval between samples of a process is at least this time (µs) multiplied by the number of
jobs. This limits the cost of all samples together."""
DOUBT: Final = 5
"""Doubtful movement, which other processes may have caused, and new waits delay SIGKILL for at most
this many times `storage_stall` after the last progress. The limit is needed because a server may
work for others and be stuck for this guest."""
MAX_CONTINUES: Final = 3
"""After this many SIGCONTs, assume that someone is stopping the process deliberately."""


class Action(Enum):
    TERMINATE = auto()
    """Send SIGTERM."""
    CONTINUE = auto()
    """Send SIGCONT."""
    KILL = auto()
    """Send SIGKILL."""
    SAMPLE = auto()
    WAIT = auto()
    """Do nothing until `wake`."""
    YANK = auto()
    """Cut off the storage that does not move."""
    GIVE_UP = auto()
    """End the job: the process outlived the ladder."""
    LEAVE = auto()
    """End the job: the signal was sent, and NOWAIT is set."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What the next decision must know of the earlier ones. Times are CLOCK_MONOTONIC in µs."""

    due: int = 0
    """When SIGKILL is due according to earlier decisions. Only a shorter `max` or `grace` can make
    SIGKILL due before that."""
    start: int = 0
    """When the waiting times last started; 0 if not known."""
    unsampled: int = 0
    """The value of Assessment.unsampled at `start`."""
    overdue_at: int = 0
    """The time of the last usable sample if the evidence already allowed SIGKILL then, but a hold,
    an extension or the grace delayed it; otherwise 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    flags: Flag
    policy: Policy
    started: int | None = None
    """When the job began; None if unknown: `term_at` is used instead."""
    term_at: int | None = None
    """When SIGTERM was sent."""
    kill_at: int | None = None
    """When SIGKILL was sent."""
    continued_at: int | None = None
    """When SIGCONT was last sent."""
    continues: int = 0
    yank_at: int | None = None
    """When dead storage was last cut off."""
    may_yank: bool = False
    """Whether QEMU may have storage that can be cut off."""
    assessment: Assessment | None = None
    jobs: int = 1
    """The number of running jobs. With more jobs, each is sampled more rarely."""
    control: Control = UNCONTROLLED
    promise: Promise = Promise()

    @property
    def by_evidence(self) -> bool:
        return Flag.FIXED not in self.flags and Flag.NOWAIT not in self.flags


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    deadline: int = INFINITY
    """The time at which the next rung is due or the job gives up, if nothing changes."""
    wake: int = INFINITY
    """With WAIT: when to decide again; INFINITY if only an event can change the decision."""
    promise: Promise | None = None
    """The value of JobFacts.promise for the next decision; None if it stays the same."""


def policy_for(flags: Flag, configured: Policy, spans: Mapping[str, int]) -> Policy:
    """Return the policy of a job. FIXED overrides the configuration, and the caller's spans
    override both.

    `spans` are fields of Policy, in µs.
    """
    return replace(FIXED_POLICY if Flag.FIXED in flags else configured, **spans)


def lengthen(policy: Policy, spans: Mapping[str, int]) -> Policy:
    """Lengthen the spans of the policy to the requested ones, but shorten none."""
    return replace(
        policy, **{name: max(usec, getattr(policy, name)) for name, usec in spans.items()}
    )


def decide(facts: JobFacts, now: int) -> Decision:
    """Return the next step for a process that has not exited at `now`."""
    flags, policy = facts.flags, facts.policy
    if facts.kill_at is not None:
        if Flag.NOWAIT in flags:
            return Decision(Action.LEAVE)
        due = _add(facts.kill_at, policy.reap)
        if due <= now:
            return Decision(Action.GIVE_UP)
        # Sample a process that outlives SIGKILL, to find out what it waits for.
        sample_at = next_sample_time(facts, facts.kill_at) if facts.by_evidence else INFINITY
        if sample_at <= now:
            return Decision(Action.SAMPLE, due)
        return Decision(Action.WAIT, due, min(sample_at, due))
    if Flag.NOWAIT in flags and Flag.FORCE in flags:
        return Decision(Action.KILL)
    if facts.term_at is None:
        until = facts.control.held_until if facts.control.held else 0
        return Decision(Action.WAIT, until, until) if now < until else Decision(Action.TERMINATE)
    if Flag.NOWAIT in flags:
        return Decision(Action.LEAVE)
    if not facts.by_evidence:
        deadline = _deadline(facts, _fixed_due(facts))
        if deadline <= now:
            return Decision(_last(flags))
        return Decision(Action.WAIT, deadline, deadline)
    promise = _started(facts)
    due = kill_due(facts)
    evidence = facts.assessment
    # Promise a time only if it is based on a real sample, not on assumptions about a gap or a
    # useless sample. Otherwise, on a busy host, every useless sample would delay SIGKILL further.
    if evidence is not None and not tells_nothing(evidence.last):
        allowed = max(facts.promise.due, _evidence_due(facts, evidence))
        is_overdue = _add(allowed, _reap(facts)) <= evidence.last.at < _deadline(facts, due)
        # When a hold ends, the last sample is still the one that was taken during the hold.
        is_overdue = is_overdue or facts.promise.overdue_at == evidence.last.at
        overdue_at = evidence.last.at if is_overdue else 0
        promise = replace(promise, due=min(allowed, _latest(facts)), overdue_at=overdue_at)
    return _by_evidence(facts, _deadline(facts, due), now, promise)


def _by_evidence(facts: JobFacts, deadline: int, now: int, promise: Promise) -> Decision:
    assert facts.term_at is not None
    if _should_continue(facts):
        return Decision(Action.CONTINUE, deadline, promise=promise)
    if deadline <= now:
        action = _last(facts.flags) if _is_fresh(facts, deadline, now) else Action.SAMPLE
        if action is Action.KILL and should_yank(facts, now):
            action = Action.YANK
        return Decision(action, deadline, promise=promise)
    sample_at = next_sample_time(facts, _last_action_at(facts))
    if sample_at <= now:
        return Decision(Action.SAMPLE, deadline, promise=promise)
    return Decision(Action.WAIT, deadline, min(sample_at, deadline), promise)


def _last(flags: Flag) -> Action:
    return Action.KILL if Flag.FORCE in flags else Action.GIVE_UP


def _deadline(facts: JobFacts, due: int) -> int:
    """Return the time at which SIGKILL is sent or the job gives up. `due`: when the ladder allows
    SIGKILL."""
    due = max(due, facts.control.not_before)
    deadline = _add(due, _reap(facts))
    return max(deadline, facts.control.held_until) if facts.control.held else deadline


def _reap(facts: JobFacts) -> int:
    """Return the time (µs) by which giving up comes later than SIGKILL would come."""
    return 0 if Flag.FORCE in facts.flags else facts.policy.reap


def kill_due(facts: JobFacts) -> int:
    """Return the time at which the evidence so far allows SIGKILL, if nothing changes.

    Time without samples is not counted. Only a shorter `max` or `grace` can make the result earlier
    than `promise.due`.
    """
    policy, evidence = facts.policy, facts.assessment
    start = _last_action_at(facts)
    # If there is no evidence yet, this is only an estimate, because SIGKILL needs a fresh sample.
    due = start + policy.stall if evidence is None else _evidence_due(facts, evidence)
    return min(max(start + policy.grace, facts.promise.due, due), _latest(facts))


def _latest(facts: JobFacts) -> int:
    """Return the time at which SIGKILL is sent whatever the evidence shows."""
    assert facts.term_at is not None
    policy = facts.policy
    began_at = facts.term_at if facts.started is None else facts.started
    earliest = facts.term_at + min(policy.grace, policy.max // 2)
    return min(max(began_at + policy.max, earliest), INFINITY)


def _evidence_due(facts: JobFacts, evidence: Assessment) -> int:
    """Return the time at which the evidence alone allows SIGKILL, whatever the grace, `max`, and
    earlier decisions."""
    policy = facts.policy
    since = max(_start_from(_started(facts), evidence), evidence.progress_from)
    due = since + policy.stall if evidence.progress_at is not None else 0
    if tells_nothing(evidence.last) and not tells_nothing(evidence.seen):
        since = max(since, evidence.seen.at)
    limit = since + policy.storage_stall * DOUBT
    if evidence.may_be_outstanding:
        # An unreadable sample starts nothing again: on a busy host, there may be many.
        begun = evidence.waiting_from if evidence.outstanding else 0
        moved = max(since, evidence.doubt_from, begun)
        return max(due, min(moved + policy.storage_stall, limit))
    ended = evidence.outstanding_from
    if evidence.waiting_from > limit:
        ended = min(ended, limit)
    return max(due, max(since, ended) + policy.stall)


def _last_action_at(facts: JobFacts) -> int:
    """Return the last time at which the process got SIGTERM or SIGCONT, or its storage was cut
    off."""
    return max(facts.term_at or 0, facts.continued_at or 0, facts.yank_at or 0)


def _started(facts: JobFacts) -> Promise:
    """Return the promise with the present start of the waiting times."""
    start, evidence, promise = _last_action_at(facts), facts.assessment, facts.promise
    if start > promise.start:
        unsampled = 0
        # If a sample was taken since then, the value at `start` is no longer known. This happens
        # only if an earlier version of qkilld has saved the job.
        if evidence is not None and evidence.last.at <= start:
            unsampled = evidence.unsampled_until(start, sample_interval(facts.jobs))
        return replace(promise, start=start, unsampled=unsampled, overdue_at=0)
    if evidence is None or tells_nothing(evidence.last) or not promise.overdue_at:
        return promise
    # Something else has delayed SIGKILL. If the process has begun or stopped waiting since then,
    # the waiting times start at this change.
    if evidence.may_be_outstanding:
        at, unsampled = evidence.waiting_at, evidence.waiting_unsampled
        has_changed = at is not None and at > promise.overdue_at
    else:
        at, unsampled = evidence.outstanding_at, evidence.outstanding_unsampled
        has_changed = at is not None and at >= promise.overdue_at
    if at is None or not has_changed:
        return promise
    return replace(promise, start=at, unsampled=unsampled)


def _start_from(promise: Promise, evidence: Assessment) -> int:
    """Return the start of the waiting times plus the time without samples since then. Of the time
    before the first sample, only the part beyond 1 s counts."""
    unsampled = max(0, evidence.unsampled - promise.unsampled)
    return promise.start + unsampled + max(0, evidence.first.at - promise.start - USEC_PER_SEC)


def sample_interval(jobs: int) -> int:
    """Return the interval (µs) between samples of a job if there are this many jobs."""
    return max(USEC_PER_SEC, jobs * PER_JOB)


def next_sample_time(facts: JobFacts, began: int) -> int:
    """Return when to take the next sample: soon at first, later once a second, and more rarely if
    there are many jobs.

    `began`: when the process last got a signal, or its storage was cut off.
    """
    sampled_at = _last_sample_at(facts)
    if sampled_at < began:
        # An idle guest exits within a few ms, before this first sample.
        return began + 100_000
    interval = 250_000 if sampled_at - began < 2 * USEC_PER_SEC else USEC_PER_SEC
    due = sampled_at + max(interval, facts.jobs * PER_JOB)
    return -(-due // GRID) * GRID


def _is_fresh(facts: JobFacts, deadline: int, now: int) -> bool:
    sampled_at = _last_sample_at(facts)
    return now - sampled_at <= FRESH or (sampled_at >= deadline and now - sampled_at <= LATE)


def _fixed_due(facts: JobFacts) -> int:
    assert facts.term_at is not None
    return _add(facts.term_at, min(facts.policy.grace, facts.policy.max))


def _should_continue(facts: JobFacts) -> bool:
    evidence = facts.assessment
    return (
        evidence is not None
        and not facts.control.held
        and can_be_continued(evidence.last)
        and evidence.last.at > (facts.continued_at or 0)
        and facts.continues < MAX_CONTINUES
    )


def should_yank(facts: JobFacts, now: int) -> bool:
    """Return whether to cut off storage before sending SIGKILL. This requires that I/O may be
    outstanding, that `max` has not passed, and that QEMU may have storage that can be cut off."""
    evidence = facts.assessment
    start = facts.term_at if facts.started is None else facts.started
    in_time = now < _add(start or 0, facts.policy.max)
    return facts.may_yank and in_time and evidence is not None and evidence.may_be_outstanding


def _last_sample_at(facts: JobFacts) -> int:
    return facts.assessment.last.at if facts.assessment is not None else 0


def _add(time: int, span: int) -> int:
    """Add a span to a time or span. The sum is at most INFINITY."""
    return min(time + span, INFINITY)
