"""The ladder: from where a job stands to what it does next.

Pure: the time comes in as an argument and nothing is remembered. Times are CLOCK_MONOTONIC in µs.

A caller may hold a job: then nothing is sent, and the job does not give up; and extend it: then no
SIGKILL comes before. Beyond that, with FIXED it goes by the clock alone, otherwise by evidence:

- never a SIGKILL without FORCE, nor within the grace after SIGTERM;
- never while there was progress within the last `stall`;
- with I/O outstanding that does not move, never within `storage_stall` of its last progress; what
  cannot be seen counts as outstanding;
- after `max` in any case;
- a process that was merely stopped is continued, and its time starts again;
- and right before a SIGKILL it looks once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from qkilld.judgement.verdict import Assessment, can_be_continued
from qkilld.model.job import UNCONTROLLED, Control
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, USEC_PER_SEC, Flag

FIXED_POLICY: Final = Policy(grace=10 * USEC_PER_SEC, reap=5 * USEC_PER_SEC, max=INFINITY)
"""The clock that libvirt has had since 2012 (virProcessKillPainfully): SIGKILL at 10 s with force,
15 s in all."""
FRESH: Final = 200_000
"""A sample no older than this (µs) is good enough to send SIGKILL on."""
LATE: Final = 1_000_000
"""So is one that was taken when SIGKILL was due already and has come late, but no later than this
(µs): where all of them come late there would never be one that is fresh."""
GRID: Final = 100_000
"""Looks are taken at multiples of this (µs)."""
MAX_CONTINUES: Final = 3
"""Who is stopped again and again is stopped by somebody who means it."""


class Action(Enum):
    TERMINATE = auto()
    """Send SIGTERM."""
    CONTINUE = auto()
    """Send SIGCONT."""
    KILL = auto()
    """Send SIGKILL."""
    LOOK = auto()
    """Take a sample."""
    WAIT = auto()
    """Nothing until `wake`."""
    GIVE_UP = auto()
    """The process outlived the ladder."""
    LEAVE = auto()
    """NOWAIT: the one signal is sent, look no further."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands on its ladder."""

    flags: Flag
    policy: Policy
    term_at: int | None = None
    """When SIGTERM was sent."""
    kill_at: int | None = None
    """When SIGKILL was sent."""
    continued_at: int | None = None
    """When SIGCONT was sent last."""
    continues: int = 0
    assessment: Assessment | None = None
    jobs: int = 1
    """How many jobs are looked at: many are looked at more rarely."""
    control: Control = UNCONTROLLED

    @property
    def by_evidence(self) -> bool:
        return not self.flags & (Flag.FIXED | Flag.NOWAIT)


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    deadline: int = INFINITY
    """When the next rung is due or the job gives up, as things look now."""
    wake: int = INFINITY
    """With WAIT: when to decide again, INFINITY for only when something happens."""


def policy_for(flags: Flag, configured: Policy, asked: Mapping[str, int]) -> Policy:
    """The policy of a job: FIXED stands over the configuration, what the caller asked over both.

    `asked` are fields of Policy, in µs.
    """
    return replace(FIXED_POLICY if Flag.FIXED in flags else configured, **asked)


def lengthened(policy: Policy, asked: Mapping[str, int]) -> Policy:
    """The policy with each span that is asked to be longer; none becomes shorter."""
    return replace(
        policy, **{name: max(usec, getattr(policy, name)) for name, usec in asked.items()}
    )


def decide(standing: Standing, now: int) -> Decision:
    """The next step for a process that is still there at `now`."""
    flags, policy = standing.flags, standing.policy
    if standing.kill_at is not None:
        if Flag.NOWAIT in flags:
            return Decision(Action.LEAVE)
        due = _add(standing.kill_at, policy.reap)
        if due <= now:
            return Decision(Action.GIVE_UP)
        # What outlives a SIGKILL is asked what holds it.
        look = next_look(standing, standing.kill_at) if standing.by_evidence else INFINITY
        if look <= now:
            return Decision(Action.LOOK, due)
        return Decision(Action.WAIT, due, min(look, due))
    if Flag.NOWAIT in flags and Flag.FORCE in flags:
        return Decision(Action.KILL)
    if standing.term_at is None:
        return Decision(Action.TERMINATE)
    if Flag.NOWAIT in flags:
        return Decision(Action.LEAVE)
    last = Action.KILL if Flag.FORCE in flags else Action.GIVE_UP
    due = kill_due(standing) if standing.by_evidence else _fixed_due(standing)
    due = max(due, standing.control.not_before)
    deadline = due if Flag.FORCE in flags else _add(due, policy.reap)
    if standing.control.held:
        deadline = INFINITY
    if not standing.by_evidence:
        return Decision(last) if deadline <= now else Decision(Action.WAIT, deadline, deadline)
    if _should_continue(standing):
        return Decision(Action.CONTINUE, deadline)
    look = next_look(standing, max(standing.term_at, standing.continued_at or 0))
    if deadline <= now:
        return Decision(last if _is_fresh(standing, deadline, now) else Action.LOOK, deadline)
    if look <= now:
        return Decision(Action.LOOK, deadline)
    return Decision(Action.WAIT, deadline, min(look, deadline))


def kill_due(standing: Standing) -> int:
    """When the evidence so far allows SIGKILL, were nothing to change."""
    assert standing.term_at is not None
    policy, evidence = standing.policy, standing.assessment
    began = max(standing.term_at, standing.continued_at or 0)
    due = _add(began, policy.grace)
    if evidence is None:
        # Before the first look: no SIGKILL follows from this, for that wants a fresh one.
        return min(_add(began, max(policy.grace, policy.stall)), _add(standing.term_at, policy.max))
    # What cannot be seen counts as outstanding: unknown is not idle.
    if evidence.outstanding is not False:
        since = max(began, evidence.progress_at or 0)
        due = max(due, _add(since, policy.storage_stall))
    else:
        since = max(began, evidence.progress_at or 0, evidence.outstanding_at or 0)
        due = max(due, _add(since, policy.stall))
    if evidence.progress_at is not None:
        due = max(due, _add(evidence.progress_at, policy.stall))
    return min(due, _add(standing.term_at, policy.max))


def at_risk(evidence: Assessment | None, policy: Policy, now: int) -> bool:
    """Whether a SIGKILL at `now` meets I/O that is outstanding or moving, or cannot be seen."""
    if evidence is None:
        return True
    moved = evidence.progress_at is not None and now - evidence.progress_at < policy.stall
    return moved or evidence.outstanding is not False


def next_look(standing: Standing, began: int) -> int:
    """When to take the next sample: closely at first, once a second then, rarely for many jobs.

    `began` is when the process was last given a reason to go.
    """
    looked = _looked_at(standing)
    if looked < began:
        # An idle guest is gone in a few ms: it costs no sample at all.
        return began + 100_000
    interval = 250_000 if looked - began < 2 * USEC_PER_SEC else USEC_PER_SEC
    due = looked + max(interval, standing.jobs * 2_000)
    # On a grid that all jobs share: those who look together share what they see of the host.
    return -(-due // GRID) * GRID


def _is_fresh(standing: Standing, deadline: int, now: int) -> bool:
    looked = _looked_at(standing)
    return now - looked <= FRESH or (looked >= deadline and now - looked <= LATE)


def _fixed_due(standing: Standing) -> int:
    assert standing.term_at is not None
    return _add(standing.term_at, min(standing.policy.grace, standing.policy.max))


def _should_continue(standing: Standing) -> bool:
    evidence = standing.assessment
    return (
        evidence is not None
        and not standing.control.held
        and can_be_continued(evidence.last)
        and evidence.last.at > (standing.continued_at or 0)
        and standing.continues < MAX_CONTINUES
    )


def _looked_at(standing: Standing) -> int:
    return standing.assessment.last.at if standing.assessment is not None else 0


def _add(time: int, span: int) -> int:
    """A point in time or a span that much later; INFINITY stays INFINITY."""
    return min(time + span, INFINITY)
